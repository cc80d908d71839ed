"""A kernel that cannot be imported is passed over with its reason, and an error where it is named.

The kernels are fake installed distributions, and two new interpreters choose them in every way that there is.
"""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest

from packages import KERNEL, Site, of_plugins, plugin, spec

NO_IMPORT = {
    "raises": ("raise RuntimeError('no luck today')", "RuntimeError: no luck today"),
    "misses_a_module": ("import a_module_that_nobody_has", "ModuleNotFoundError: .*a_module_that_nobody_has"),
    "misses_a_library": ("import ctypes; ctypes.CDLL('libno_such.so.7')", "OSError: libno_such.so.7"),
    "no_python": ("def forward(params:", "SyntaxError: "),
    "exits": ("import sys; sys.exit('this kernel knows best')", "SystemExit: this kernel knows best"),
    "panics": ("class Panic(BaseException): ...\nraise Panic('at kernel.rs')", "Panic: at kernel.rs"),
    "no_forward": ("def run(params): ...", "SpecError: .* has no forward"),
    "forward_is_a_number": ("forward = 3", "SpecError: .*forward"),
    "forward_wants_more": (
        "def forward(query, key, value): ...",
        r"SpecError: .*forward\(query, key, value\)",
    ),
    "backward_wants_less": (
        KERNEL + "\ndef backward(params, grad_out): ...",
        r"SpecError: .*backward\(params, grad_out\)",
    ),
    "backward_is_a_number": (KERNEL + "\nbackward = 3", "SpecError: .*backward is 3"),
    "supports_wants_more": (
        KERNEL + "\ndef supports(params, device): ...",
        r"SpecError: .*supports\(params, dev",
    ),
}
COUNTING = "import attempts; attempts.made.append(__name__)\n"
INTERRUPTED = "import os\nif os.environ.pop('INTERRUPT', None): raise KeyboardInterrupt\n" + KERNEL
CONTENDED = "import time; time.sleep(0.2); raise RuntimeError('all threads wanted me')"
NAMES = (*NO_IMPORT, "not_there", "no_attribute")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A folder with a distribution of kernels that cannot be imported, before a healthy one in preference."""
    site = Site(tmp_path_factory.mktemp("kernels") / "site")
    site.install_healthy()
    specs = [spec(name, priority="10") for name in (*NO_IMPORT, "not_there")]
    specs += [spec("no_attribute", "healthy_kernel:missing", priority="10")]
    specs += [spec("interrupted", priority="-95"), spec("contended", priority="-95")]
    kernels = {f"{name}_kernel": source for name, (source, _) in NO_IMPORT.items()}
    kernels |= {"interrupted_kernel": INTERRUPTED, "contended_kernel": CONTENDED}
    modules = {name: COUNTING + source for name, source in kernels.items()}
    site.install("fake-kernels", {"kernels": plugin(*specs), "attempts": "made = []", **modules})
    return site


CHOOSING = """
names = {names!r}
report["before"] = listed()
report["plain"] = works()
with attnplug.record() as calls:
    report["passed_over_works"] = works(softcap=2.0)  # torch cannot, so the registry is asked
report["chosen"] = calls[0].impl
report["passed_over"] = dict(calls[0].passed_over)

def within(name, *rest):
    with attnplug.sdpa_kernel([name, *rest], set_priority=True):
        return works()

report["by_impl"] = {{name: failure(sdpa, impl=name) for name in names}}
report["by_scope"] = {{name: failure(within, name) for name in names}}
report["by_scope_with_another"] = {{name: within(name, "healthy") for name in names}}
report["activation"] = {{name: failure(attnplug.activate_flash_attention_impl, name) for name in names}}
report["active"] = attnplug.current_flash_attention_impl()

import threading
wanting = [threading.Thread(target=failure, args=(sdpa,), kwargs=dict(impl="contended")) for _ in range(8)]
[thread.start() for thread in wanting]
[thread.join() for thread in wanting]

report["interrupt"] = failure(sdpa, impl="interrupted")
report["after_interrupt"] = works(impl="interrupted")
report["still"] = works(), works(impl="healthy"), works(impl="aten_math")
report["after"] = listed()
import attempts
report["attempts"] = attempts.made
"""

STRICTLY = """
report["by_impl"] = {{name: failure(sdpa, impl=name) for name in {names!r}}}
report["still"] = works(), works(impl="healthy"), works(impl="aten_math")
"""


@pytest.fixture(scope="module")
def chosen(site: Site) -> SimpleNamespace:
    """What happened in an interpreter that chose every kernel, in every way that there is."""
    return site.run(CHOOSING.format(names=NAMES), INTERRUPT="1")


@pytest.fixture(scope="module")
def strictly_chosen(site: Site) -> SimpleNamespace:
    """The same under ATTNPLUG_STRICT."""
    return site.run(STRICTLY.format(names=NAMES), ATTNPLUG_STRICT="1")


def reason_of(name: str) -> str:
    if name in NO_IMPORT:
        return NO_IMPORT[name][1]
    return {"not_there": "ModuleNotFoundError: .*not_there", "no_attribute": "AttributeError: .*missing"}[name]


@pytest.mark.parametrize("name", NAMES)
def test_kernel_that_cannot_be_imported_is_passed_over_with_its_reason(chosen: Any, name: str) -> None:
    assert chosen.passed_over_works and chosen.chosen == "healthy"
    (reason,) = chosen.passed_over[name]
    assert re.search(reason_of(name), reason)


@pytest.mark.parametrize("name", NAMES)
def test_kernel_that_cannot_be_imported_is_an_error_where_it_is_named(chosen: Any, name: str) -> None:
    for failure in (chosen.by_impl[name], chosen.by_scope[name]):
        assert {"NoImplementationError", "AttnplugError", "RuntimeError"} <= set(failure["kinds"])
        assert name in failure["message"] and re.search(reason_of(name), failure["message"])
    assert chosen.by_scope_with_another[name]


@pytest.mark.parametrize("name", NAMES)
def test_kernel_that_cannot_be_imported_is_broken_from_then_on(chosen: Any, name: str) -> None:
    assert chosen.before[name]["status"] == "available" and chosen.before[name]["reason"] == ""
    assert chosen.after[name]["status"] == "broken"
    assert re.search(reason_of(name), chosen.after[name]["reason"])


@pytest.mark.parametrize("name", (*NAMES, "contended"))
def test_kernel_that_cannot_be_imported_warns_once(chosen: Any, name: str) -> None:
    (warning,) = (message for message in of_plugins(chosen.warnings) if repr(name) in message)
    assert "fake-kernels" in warning and chosen.after[name]["reason"] in warning


@pytest.mark.parametrize("name", (*NO_IMPORT, "contended"))
def test_import_of_a_kernel_is_tried_once(chosen: Any, name: str) -> None:
    tries = 0 if name == "no_python" else 1  # a syntax error comes before anything could be counted
    assert chosen.attempts.count(f"{name}_kernel") == tries


@pytest.mark.parametrize("name", NAMES)
def test_kernel_that_cannot_be_imported_cannot_be_activated(chosen: Any, name: str) -> None:
    assert "AttnplugError" in chosen.activation[name]["kinds"] and chosen.active is None
    assert re.search(reason_of(name), chosen.activation[name]["message"])


def test_calls_work_whatever_kernels_are_broken(chosen: Any, strictly_chosen: Any) -> None:
    assert chosen.plain and all(chosen.still) and all(strictly_chosen.still)
    assert chosen.after["healthy"]["status"] == "available"


def test_keyboard_interrupt_in_a_kernel_reaches_the_user_and_the_next_call_tries_again(chosen: Any) -> None:
    assert chosen.interrupt["kinds"][0] == "KeyboardInterrupt"
    assert chosen.after_interrupt and chosen.after["interrupted"]["status"] == "available"


@pytest.mark.parametrize("name", NAMES)
def test_strict_raises_what_broke_the_kernel(strictly_chosen: Any, name: str) -> None:
    failure = strictly_chosen.by_impl[name]
    assert {"PluginError", "AttnplugError"} <= set(failure["kinds"])
    assert name in failure["message"] and re.search(reason_of(name), failure["message"])
    assert reason_of(name).startswith(failure["cause"])
    assert of_plugins(strictly_chosen.warnings) == []
