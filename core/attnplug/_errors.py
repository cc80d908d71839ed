"""Every error that attnplug raises on purpose, in one hierarchy, so that a caller can catch them all.

Each also derives from the built-in exception that the same mistake raises in PyTorch, so that code
written for `torch.nn.attention` keeps working. Each survives pickling, because data-loader workers raise.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


class AttnplugError(Exception):
    """Base class of every error of attnplug."""


class UnknownImplementationError(AttnplugError, ValueError):
    """A name that no implementation has.

    Args:
        name: what was asked for.
        available: the names that exist.
        where: where the name came from, when it was not an argument (for example `ATTNPLUG_IMPL`).
    """

    def __init__(self, name: str, available: Iterable[str], where: str = "") -> None:
        self.name, self.where = name, where
        self.available = tuple(sorted(available))
        prefix = f"{where}: " if where else ""
        super().__init__(
            f"{prefix}unknown implementation {name!r}{did_you_mean(name, self.available) or '.'} "
            f"Available: {', '.join(self.available) or 'none'}"
        )

    def __reduce__(self) -> Any:
        return type(self), (self.name, self.available, self.where)


class DuplicateImplementationError(AttnplugError, ValueError):
    """Two providers claim one name; the first keeps it.

    Args:
        name: the name that both claim.
        owner: the distribution (or program) that has it.
        claimant: the distribution (or program) that wanted it too.
    """

    def __init__(self, name: str, owner: str, claimant: str) -> None:
        self.name, self.owner, self.claimant = name, owner, claimant
        super().__init__(
            f"implementation {name!r} of {claimant} is already provided by {owner}, which keeps it; "
            f"rename one of them or uninstall one distribution"
        )

    def __reduce__(self) -> Any:
        return type(self), (self.name, self.owner, self.claimant)


class NoImplementationError(AttnplugError, RuntimeError):
    """No allowed implementation supports a call.

    Args:
        reasons: for every candidate, in the order in which it was asked, all its reasons.
        selection: what restricted the candidates (for example `impl='flash_triton'`).
    """

    def __init__(self, reasons: Mapping[str, Sequence[str]], selection: str = "") -> None:
        self.reasons = {name: tuple(why) for name, why in reasons.items()}
        self.selection = selection
        head = "no implementation supports this call" + (f" ({selection})" if selection else "")
        lines = [f"  {name}: {'; '.join(why)}" for name, why in self.reasons.items()]
        super().__init__("\n".join([head + ":", *lines] if lines else [head + ": no candidates"]))

    def __reduce__(self) -> Any:
        return type(self), (self.reasons, self.selection)


class ConfigError(AttnplugError, ValueError):
    """An environment variable of attnplug has a value that means nothing."""


class SpecError(AttnplugError, ValueError):
    """A field of an `ImplSpec` or `Capabilities` is wrong; the message names the field and the fix."""


class PluginError(AttnplugError, RuntimeError):
    """A plugin could not be loaded, or its kernel could not; the cause is chained."""


class KernelError(AttnplugError, RuntimeError):
    """A kernel broke its promise: what it returned does not have the shape, dtype or device it must."""


class GradientError(AttnplugError, RuntimeError):
    """A gradient was asked for that the implementation which ran forward does not give."""


class ScopeError(AttnplugError, RuntimeError):
    """A scope or a recording was left that was not entered, or a scope was left that several other threads are in."""


class PluginWarning(UserWarning):
    """A plugin, or its kernel, is broken; everything else goes on working."""


class FallbackWarning(UserWarning):
    """A preferred implementation could not take a call, and the next candidate did."""


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the closest of `known`, or an empty string."""
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""
