"""What every test shares: it starts from, and leaves, a registry with nothing added and nothing active."""

from __future__ import annotations

import gc
import logging
import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

import attnplug
import forked
from process_state import differences, forget, registered, snapshot

# A run that fails fails again, and how long an example takes is the machine's affair.
settings.register_profile("repeatable", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("repeatable")
logging.getLogger("torch.__trace").propagate = False  # pytest would keep each graph that is compiled, written out

HAS_GPU = torch.cuda.is_available()
if HAS_GPU:  # PyTorch reads this once, at its first product, and without it refuses products in deterministic mode
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
else:  # or each process in which Inductor compiles a little starts others for that, which import torch first
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
forked.listen()


SECONDS = (0.1, 0.5, 40.0)
"""About what a test takes, by its `_length`."""


@pytest.hookimpl(trylast=True)  # when those that do not run are gone
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    items[:] = _dealt(items, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))


def _dealt(items: list[pytest.Item], processes: int) -> list[pytest.Item]:
    """Order tests for processes that are each given a part of the list at first, all of equal length.

    The tests of a folder are one process's, as they share what takes long to make: worlds of ranks, sites, models, and
    what they import. Each process begins with its longest: at the end none is left alone with that.
    """
    weights: defaultdict[Path, float] = defaultdict(float)
    for item in items:
        weights[item.path.parent] += SECONDS[_length(item)]
    loads, owners = [0.0] * processes, {}
    for folder, weight in sorted(weights.items(), key=lambda each: (-each[1], each[0])):
        owners[folder] = loads.index(min(loads))
        loads[owners[folder]] += weight
    parts: list[list[pytest.Item]] = [[] for _ in range(processes)]
    for item in sorted(items, key=_length, reverse=True):
        parts[owners[item.path.parent]].append(item)
    # What is too many for one process goes from the end of its part to the end of another's.
    sizes = [(len(items) + place) // processes for place in range(processes)]
    surplus = [item for part, size in zip(parts, sizes, strict=True) for item in part[size:]]
    dealt: list[pytest.Item] = []
    for part, size in zip(parts, sizes, strict=True):
        missing = max(0, size - len(part))
        dealt += part[:size] + surplus[:missing]
        del surplus[:missing]
    assert {*dealt} == {*items}  # one that is left out would be missed by nobody
    return dealt


def _length(item: pytest.Item) -> int:
    """How long it takes, roughly: whatever else is left may end before what takes longest."""
    marker = item.get_closest_marker("slow")
    return 0 if marker is None else 1 + marker.kwargs.get("first", False)


def pytest_collection_finish() -> None:
    gc.freeze()  # what is imported by now stays, and a collector that walked it would take a second each time
    gc.set_threshold(50_000, 20, 20)


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture
def on_devices(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Say which kinds of devices this machine has. No public name can: a program lives with what is there."""
    return lambda *found: monkeypatch.setattr("attnplug._registry.registry.device_types", lambda: frozenset(found))


@pytest.fixture(autouse=True)
def _leaves_no_trace() -> Iterator[None]:
    """Fail a test that leaves the process in another state than it found; what it registered is taken away."""
    # Without a GPU, `torch.manual_seed` keeps what to tell one, with a traceback: a fifth of the time of an empty test.
    (torch if HAS_GPU else torch.default_generator).manual_seed(0)
    before = snapshot()
    yield
    if attnplug.current_flash_attention_impl() is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            attnplug.restore_flash_attention_impl()
    for name, distribution in registered().items():
        if distribution == "this program":
            attnplug.unregister_impl(name)
    forget()
    changed = differences(before, snapshot())
    if changed:  # a bound module counts until it is collected
        gc.collect()
        changed = differences(before, snapshot())
    assert not changed, "the test leaves the process changed: " + "; ".join(changed)
