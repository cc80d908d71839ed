"""In which module of a model a call is made: read off the frames of Python, so that nothing is kept meanwhile."""

from __future__ import annotations

import sys
import weakref
from types import FrameType

import torch

_CALL = torch.nn.Module._call_impl.__code__
_names: weakref.WeakKeyDictionary[torch.nn.Module, dict[int, str]] = weakref.WeakKeyDictionary()


def current_module() -> str:
    """Return the innermost module that is running, as `LlamaModel.layers.3.self_attn`; empty if none is.

    Of compiled code only the module that was compiled is known, because those in it do not run.
    """
    running: list[torch.nn.Module] = []  # innermost first
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _CALL and not isinstance(module := frame.f_locals["self"], torch.fx.GraphModule):
            running.append(module)
        frame = frame.f_back
    if not running:
        return ""
    inner = running[0]
    for root in reversed(running):
        name = _names_in(root).get(id(inner))
        if name is not None:
            name = name.removeprefix("_orig_mod").lstrip(".")
            return ".".join(part for part in (_class_of(root), name) if part)
    return _class_of(inner)


def _names_in(root: torch.nn.Module) -> dict[int, str]:
    names = _names.get(root)
    if names is None:
        names = _names[root] = {id(module): name for name, module in root.named_modules()}
    return names


def _class_of(module: torch.nn.Module) -> str:
    compiled = getattr(module, "_orig_mod", None)
    return type(module).__name__ if compiled is None else f"{type(compiled).__name__} (compiled)"
