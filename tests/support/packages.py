"""Fake installed distributions, and fresh interpreters that find them; nothing is installed with pip.

An installed distribution is no more than its modules and a folder NAME-1.0.dist-info beside them, anywhere
on the path of modules. `Site` writes them into a folder and runs scripts in new processes that see it.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace
from typing import Any

import forked

HEAD = "import attnplug\nfrom attnplug import Capabilities, Feature, ImplSpec, SDPBackend, hookimpl\n"

HOOK = "@hookimpl\ndef attnplug_register_impls():\n"

KERNEL = """
import torch

def forward(params):
    logits = params.scale * params.query @ params.key.mT
    if params.softcap:
        logits = params.softcap * torch.tanh(logits / params.softcap)
    return torch.softmax(logits, -1) @ params.value, torch.logsumexp(logits.float(), -1)

composite = True
"""

# What every script starts with. Warnings are counted, not shown: without it Python itself would show equal
# ones once, whoever repeats them.
PRELUDE = """
import json, sys, warnings
import attnplug

report = {}
caught = []
warnings.simplefilter("always")
warnings.showwarning = lambda message, category, *where: caught.append((category.__name__, str(message)))

def listed():
    fields = ("distribution", "version", "status", "reason")
    records = [(r.name, {field: getattr(r, field) for field in fields}) for r in attnplug.list_impls()]
    assert len(dict(records)) == len(records), records
    return dict(records)

def failure(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except BaseException as error:  # it is compared, whatever it is
        kinds = [kind.__name__ for kind in type(error).__mro__]
        return {"kinds": kinds, "message": str(error), "cause": type(error.__cause__).__name__}

def sdpa(*, seed=0, **kwargs):
    import torch
    query, key, value = torch.randn(3, 1, 2, 5, 8, generator=torch.Generator().manual_seed(seed))
    return attnplug.scaled_dot_product_attention(query, key, value, **kwargs)

def works(**kwargs):
    import torch
    query, key, value = torch.randn(3, 1, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    logits = query @ key.mT / 8**0.5
    if cap := kwargs.get("softcap"):
        logits = cap * torch.tanh(logits / cap)
    return torch.allclose(sdpa(**kwargs), torch.softmax(logits, -1) @ value, atol=1e-5)

"""

EPILOGUE = "\nreport['warnings'] = caught\nprint(json.dumps(report))\n"


def spec(name: str, kernel: str = "", **fields: str) -> str:
    """Return the source of an `ImplSpec` that declares every feature; fields are source too."""
    given = {
        "kernel": repr(kernel or f"{name}_kernel"),
        "backend": "SDPBackend.MATH",
        "capabilities": "Capabilities(features=Feature)",
        "priority": "-90",
    } | fields
    return f"ImplSpec(name={name!r}, {', '.join(f'{field}={source}' for field, source in given.items())})"


def plugin(*specs: str) -> str:
    """Return the source of a light module that registers specifications."""
    return f"{HEAD}{HOOK}    return [{', '.join(specs)}]\n"


class Site:
    """A folder of fake installed distributions, and interpreters that have it on their path."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def install(self, name: str, modules: Mapping[str, str], entry_points: Mapping[str, str] | None = None) -> None:
        """Write distribution `name` 1.0 with these sources; without entry points, its first module is one."""
        for module, source in modules.items():
            (self.folder / f"{module}.py").write_text(source)
        if entry_points is None:
            module = next(iter(modules))
            entry_points = {module: module}
        info = self.folder / f"{name.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        lines = "\n".join(f"{key} = {value}" for key, value in entry_points.items())
        (info / "entry_points.txt").write_text(f"[attnplug]\n{lines}\n")

    def install_healthy(self, name: str = "healthy") -> None:
        """Write distribution `fake-NAME`, whose implementation `NAME` takes any call that tests make."""
        self.install(f"fake-{name}", {name: plugin(spec(name)), f"{name}_kernel": KERNEL})

    def python(self, script: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run `script` in a new process that has torch, but not attnplug, imported."""
        return forked.run(dedent(script), self._environment(environment), self.folder)

    def interpreter(self, script: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run `script` in a new interpreter, for those who ask what is imported."""
        return subprocess.run(
            [sys.executable, "-c", dedent(script)],
            env=self._environment(environment),
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=600,
        )

    def _environment(self, given: Mapping[str, str]) -> dict[str, str]:
        """Return the environment in which the folder's distributions are installed.

        Plugins that happen to be installed beside the tests stay out, unless ATTNPLUG_DISABLE is given.
        """
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("ATTNPLUG_")}
        path = os.pathsep.join(filter(None, (str(self.folder), os.environ.get("PYTHONPATH"))))
        others = ",".join(sorted(importlib.metadata.entry_points(group="attnplug").names))
        defaults = {"ATTNPLUG_DISABLE": others, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        return inherited | defaults | dict(given)

    def run(self, script: str, **environment: str) -> SimpleNamespace:
        """Run `script`, which fills `report`; return that, with the `warnings` that came and `stderr`."""
        done = self.python(PRELUDE + dedent(script) + EPILOGUE, **environment)
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)  # whatever else were on stdout would be an error
        return SimpleNamespace(**report, stderr=done.stderr)


def of_plugins(warnings: list[Any]) -> list[str]:
    """Return the messages of the `PluginWarning`s among a report's warnings."""
    return [message for category, message in warnings if category == "PluginWarning"]
