"""Report versions, GPUs, variables and implementations, to be pasted into a bug report.

It holds no home directory and no user name. It is plain text on a terminal too, so that what is copied
keeps its lines. What fails is reported, and the rest of the report still comes.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import textwrap
import warnings
from collections.abc import Callable
from typing import Any

import attnplug
from attnplug._registry.machine import installed_version
from attnplug._tables import table
from attnplug.cli import render

HELP = "report the environment, to be pasted into a bug report"

_PACKAGES = ("triton", "transformers", "flash-attn", "xformers", "numpy")
_VARIABLES = re.compile(
    r"(ATTNPLUG_|TRITON_|TORCH|PYTORCH_|CUDA_|CUBLAS_|CUDNN_|HIP_|ROCR_)\w*"
    r"|NVIDIA_TF32_OVERRIDE|OMP_NUM_THREADS"
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Nothing beyond `--json`."""


def run(arguments: argparse.Namespace) -> int:
    report = scrubbed(_report())
    if arguments.json:
        render.print_json(report)
    else:
        render.put(_as_text(report))
    return 0


def _report() -> dict[str, Any]:
    """Return the whole report; a warning, such as PyTorch's about a driver too old, is a part of it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = {
            "versions": {
                "attnplug": attnplug.__version__,
                "python": f"{platform.python_version()} ({platform.python_implementation()})",
                "system": platform.platform(),
                **_attempt(_torch, lambda error: {"torch": error}),
                "nvidia driver": _nvidia_driver(),
                **{name: installed_version(name) for name in _PACKAGES},
            },
            "gpus": _attempt(_gpus, lambda error: [{"name": error}]),
            "environment": {name: value for name, value in sorted(os.environ.items()) if _VARIABLES.fullmatch(name)},
            "implementations": _attempt(_implementations, _no_implementation),
        }
    return {**report, "warnings": list(dict.fromkeys(str(warning.message) for warning in caught))}


def _attempt(ask: Callable[[], Any], otherwise: Callable[[str], Any]) -> Any:
    """Return what `ask` returns, or, where it raises, `otherwise` of the error."""
    try:
        return ask()
    except Exception as error:  # whatever it is, a report is for such days
        return otherwise(f"failed: {type(error).__name__}: {error}")


def _torch() -> dict[str, str | None]:
    import torch

    return {
        "torch": torch.__version__,
        "torch commit": torch.version.git_version,
        "torch cpu kernels": torch.backends.cpu.get_cpu_capability(),
        "cuda runtime": torch.version.cuda,
        "rocm runtime": torch.version.hip,
        "cudnn": _attempt(_cudnn, lambda said: said.strip()),
    }


def _cudnn() -> str | None:
    import torch

    version = torch.backends.cudnn.version()  # of one that PyTorch was not built for the report holds what it says
    return None if version is None else str(version)


def _nvidia_driver() -> str | None:
    import subprocess  # 10 ms, of which `attnplug list` has few

    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, check=False, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        return f"failed: {type(error).__name__}: {error}"
    return next(iter((answer.stdout or answer.stderr).splitlines()), None)


def _gpus() -> list[dict[str, str]]:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = [torch.cuda.get_device_properties(index) for index in range(count)]
    return [{"name": gpu.name, **_kind(gpu), "memory": f"{gpu.total_memory / 2**30:.1f} GiB"} for gpu in gpus]


def _kind(gpu: Any) -> dict[str, str]:
    import torch

    if torch.version.hip is not None:
        return {"architecture": gpu.gcnArchName}
    return {"compute capability": f"{gpu.major}.{gpu.minor}"}


def _implementations() -> list[dict[str, str]]:
    return [
        {
            "name": record.name,
            "distribution": record.distribution,
            "version": record.version,
            "status": record.status,
            "reason": record.reason,
        }
        for record in attnplug.list_impls()
    ]


def _no_implementation(error: str) -> list[dict[str, str]]:
    return [{"name": "-", "distribution": "-", "version": "-", "status": "-", "reason": error}]


def _as_text(report: dict[str, Any]) -> str:
    gpus = [", ".join(f"{name} {value}" for name, value in gpu.items()) for gpu in report["gpus"]]
    rows = [[_shown(cell) for cell in item.values()] for item in report["implementations"]]
    parts = [
        _aligned(report["versions"]),
        _section("gpus", "\n".join(gpus)),
        _section("environment", _aligned(report["environment"])),
        table(("implementation", "distribution", "version", "status", "reason"), rows),
    ]
    if report["warnings"]:
        parts.append(_section("warnings", "\n".join(report["warnings"])))
    return "\n\n".join(parts)


def _section(title: str, text: str) -> str:
    return f"{title}:\n{textwrap.indent(text or 'none', '  ')}"


def _aligned(fields: dict[str, str | None]) -> str:
    width = max(map(len, fields), default=0)
    return "\n".join(f"{name:{width}}  {_shown(value)}" for name, value in fields.items())


def _shown(value: str | None) -> str:
    return "none" if value is None else value


def scrubbed(value: Any) -> Any:
    """Return `value`, JSON, without home directories and user names in paths."""
    if isinstance(value, dict):
        return {name: scrubbed(item) for name, item in value.items()}
    if isinstance(value, list):
        return [scrubbed(item) for item in value]
    if not isinstance(value, str):
        return value
    home = os.path.expanduser("~")
    if home.strip("/\\~"):  # a home of "/" is nobody's
        value = re.sub(rf"(?<![\w.~-]){re.escape(home)}(?![\w.-])", "~", value)
    value = re.sub(r"([/\\](?:home|Users)[/\\])[^/\\\s]+", r"\1<user>", value)
    users = {os.environ.get(name) for name in ("USER", "LOGNAME", "USERNAME")} | {os.path.basename(home)}
    for user in filter(None, users):
        value = re.sub(rf"(?<=[/\\]){re.escape(user)}(?![\w.-])", "<user>", value)
    return value
