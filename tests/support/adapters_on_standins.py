"""Adapters on stand-ins of their libraries, registered for CPU tensors so that the kit can run."""

from __future__ import annotations

import importlib
from dataclasses import replace
from functools import reduce
from operator import or_
from types import ModuleType
from typing import Any

import attnplug
from attnplug import Capabilities, ImplSpec, SDPBackend
from attnplug.testing import Report


def standin(name: str) -> ModuleType:
    """Return a new copy of a stand-in, a module of `libraries`, that a test may change."""
    return importlib.reload(importlib.import_module(f"libraries.{name}"))


def on_cpu(capabilities: Capabilities) -> Capabilities:
    """Return what an adapter declares for GPUs as if it were for the CPU."""
    parts = [
        replace(part, devices=("cpu",), compute_capability=None, alternatives=())
        for part in capabilities.alternatives
        if "cuda" in (part.devices or ())
    ]
    return reduce(or_, parts)


def register(kernel: Any, capabilities: Capabilities, name: str = "emulated") -> None:
    """Register an adapter for CPU tensors."""
    spec = ImplSpec(
        name=name, kernel=kernel, backend=SDPBackend.MATH, capabilities=on_cpu(capabilities), priority=-1000
    )
    attnplug.register_impl(spec)


def wrong(report: Report) -> list[str]:
    """Return each check in which a call that was taken went wrong, or in which every call was declined."""
    return [f"{result.check}: {result.reason}" for result in report.results if result.status == "failed"]
