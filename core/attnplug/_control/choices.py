"""Measured choices put to use for the whole process."""

from __future__ import annotations

import os

from attnplug._arguments import as_path
from attnplug._control.patch import PatchHandle, patch_torch
from attnplug._dispatch.measured import forget_warnings
from attnplug._messages import warn
from attnplug._registry.forks import ACTIVATION, lock
from attnplug._selection.choices import Choices
from attnplug._selection.state import automatic_choices, choices_of_environment, process, start

_lock = lock(ACTIVATION)
_patch: PatchHandle | None = None


def use_choices(choices: Choices | str | os.PathLike[str]) -> None:
    """Let measured choices decide, in the whole process, where nothing with higher precedence does.

    Stronger are `impl=`, a scope, an activation and `ATTNPLUG_IMPL`. A call of a kind that was not measured, or a table
    of another device or of other versions, falls to the default order: `explain` says why, and one `ChoicesWarning`.
    An implementation that was chosen and declines a call is passed over, with a `FallbackWarning`.

    `torch.nn.functional.scaled_dot_product_attention` follows, in unmodified and already compiled models, as it does
    for an activation. These choices replace those in use before.

    Args:
        choices: what `tune` returned, the path of a file, or `"auto"`, which is this user's file, as in
            `ATTNPLUG_CHOICES`, and need not exist yet. (A file of that name is `"./auto"`.)

    Raises:
        ChoicesError: the file cannot be read, or holds no choices; what was in use stays so.
        TypeError: `choices` is neither.

    Examples:
        >>> import attnplug
        >>> from attnplug.bench import Case
        >>> choices = attnplug.tune([Case(heads=2, queries=16, head_size=8)], ["torch", "aten_math"], seconds=0.01)
        >>> attnplug.use_choices(choices)
        >>> attnplug.restore_choices()
    """
    global _patch
    if isinstance(choices, str) and choices == "auto":
        choices = automatic_choices()
    elif isinstance(choices, (str, os.PathLike)):
        choices = Choices.load(as_path("choices", choices))
    if not isinstance(choices, Choices):
        raise TypeError(f"choices: expected Choices, the path of a file or 'auto', got {type(choices).__name__}")
    with _lock:
        start()
        if _patch is None:
            _patch = patch_torch()
        _become(choices)


def restore_choices() -> None:
    """Undo `use_choices`: what `ATTNPLUG_CHOICES` names is in use again, or nothing. Without choices in use, warn."""
    global _patch
    with _lock:
        if _patch is None:
            warn(UserWarning("restore_choices: no choices are in use"))
            return
        _become(choices_of_environment())
        _patch.remove()
        _patch = None


def _become(choices: Choices | None) -> None:
    process.choices = choices
    forget_warnings()
    start().changed()  # what was decided before may be decided otherwise
