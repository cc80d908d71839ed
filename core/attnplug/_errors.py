"""Every error that attnplug raises on purpose, in one hierarchy, so that a caller can catch them all.

Each also derives from the built-in exception that the same mistake raises in PyTorch, so that code
written for `torch.nn.attention` keeps working. Each survives pickling, because data-loader workers raise.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

BROKEN = "is installed but broken"
"""How the reason begins why nothing of a plugin can be used that could not be loaded."""


class AttnplugError(Exception):
    """Base class of every error of attnplug."""


class UnknownImplementationError(AttnplugError, ValueError):
    """A name that no implementation has, or whose plugin is broken, disabled or not installed.

    Args:
        name: what was asked for.
        available: the names that exist.
        where: where the name came from, if it was not an argument (for example `ATTNPLUG_IMPL`).
        absent: names that are known and cannot be used, with the reason, a phrase such as
            `is disabled by ATTNPLUG_DISABLE`.
    """

    def __init__(
        self, name: str, available: Iterable[str], where: str = "", absent: Mapping[str, str] | None = None
    ) -> None:
        self.name, self.where = name, where
        self.available = tuple(sorted(available))
        self.absent = {known: why for known, why in (absent or {}).items() if known not in self.available}
        prefix = f"{where}: " if where else ""
        if name in self.absent:
            text = f"implementation {name!r} {self.absent[name]}."
        else:
            close = did_you_mean(name, dict.fromkeys((*self.available, *self.absent)), self.absent)
            text = f"unknown implementation {name!r}{close or '.'}"
            if not close:
                broken = ((known, why) for known, why in self.absent.items() if why.startswith(BROKEN))
                text += "".join(f" Plugin {known!r}, which may have it, {why}." for known, why in broken)
        super().__init__(f"{prefix}{text} Available: {', '.join(self.available) or 'none'}")

    def __reduce__(self) -> Any:
        return type(self), (self.name, self.available, self.where, self.absent)


class DuplicateImplementationError(AttnplugError, ValueError):
    """Two providers claim one name.

    Args:
        name: the name that both claim.
        owner: the distribution (or program) that has it, or claimed it first.
        claimant: the distribution (or program) that claimed it too.
        way_out: what resolves the conflict.
    """

    def __init__(self, name: str, owner: str, claimant: str, way_out: str = "rename one of them") -> None:
        self.name, self.owner, self.claimant, self.way_out = name, owner, claimant, way_out
        super().__init__(f"implementation {name!r} of {claimant} is already provided by {owner}; {way_out}")

    def __reduce__(self) -> Any:
        return type(self), (self.name, self.owner, self.claimant, self.way_out)


class NoImplementationError(AttnplugError, RuntimeError):
    """No allowed implementation supports a call.

    Args:
        reasons: for every candidate, in the order in which it was asked, all its reasons.
        selection: what restricted the candidates (for example `impl='flash_triton'`).
        way_out: what would bring an implementation that supports it; empty if nothing is known.
    """

    def __init__(self, reasons: Mapping[str, Sequence[str]], selection: str = "", way_out: str = "") -> None:
        self.reasons = {name: tuple(why) for name, why in reasons.items()}
        self.selection, self.way_out = selection, way_out
        head = "no implementation supports this call" + (f" ({selection})" if selection else "")
        lines = [f"  {name}: {'; '.join(why)}" for name, why in self.reasons.items()]
        text = "\n".join(
            [head + ":", *(lines or ["  none that is installed may run; `attnplug doctor` says what else there is"])]
        )
        super().__init__(f"{text}\n{way_out}" if way_out else text)

    def __reduce__(self) -> Any:
        return type(self), (self.reasons, self.selection, self.way_out)


class ConfigError(AttnplugError, ValueError):
    """An environment variable of attnplug has an invalid name or value."""


class ChoicesError(AttnplugError, ValueError):
    """A file of measured choices cannot be read or written, or is not such a file."""


class SpecError(AttnplugError, ValueError):
    """A field of an `ImplSpec` or `Capabilities` is wrong; the message names the field and the fix."""


class PluginError(AttnplugError, RuntimeError):
    """A plugin could not be loaded, or its kernel could not; the cause is chained."""


class KernelError(AttnplugError, RuntimeError):
    """A kernel broke its contract: what it returned does not have the required shape, dtype or device."""


class GradientError(AttnplugError, RuntimeError):
    """A gradient is needed that the implementation that ran forward does not compute."""


class MismatchError(AttnplugError, RuntimeError):
    """`verify` found a result that is further from the reference than is allowed.

    Args:
        mismatches: a `Mismatch` for each wrong result of one call.
    """

    def __init__(self, *mismatches: Any) -> None:
        self.mismatches = mismatches
        super().__init__("\n".join(map(str, mismatches)))

    def __reduce__(self) -> Any:
        return type(self), self.mismatches


class ScopeError(AttnplugError, RuntimeError):
    """A scope or a recording was left that was not entered, or a scope was left that several other threads are in.

    Or a recording is entered twice, or where it cannot be.
    """


class PluginWarning(UserWarning):
    """A plugin, or its kernel, is broken; everything else keeps working."""


class MismatchWarning(UserWarning):
    """`verify` found a result that is further from the reference than is allowed."""


class FallbackWarning(UserWarning):
    """A preferred implementation could not take a call, and the next candidate did."""


class ChoicesWarning(UserWarning):
    """Measured choices are in use but do not apply here, or not to a call, which then runs in the default order."""


def did_you_mean(name: object, known: Iterable[str], remarks: Mapping[str, str] | None = None) -> str:
    """Return `; did you mean 'x'?` for the closest of `known`, or an empty string; `remarks` says more of some."""
    in_lower_case: dict[str, str] = {}
    for each in known:
        in_lower_case.setdefault(each.lower(), each)
    close = difflib.get_close_matches(str(name).lower(), in_lower_case, n=1, cutoff=0.6)
    if not close:
        return ""
    meant = in_lower_case[close[0]]
    remark = (remarks or {}).get(meant, "")
    return f"; did you mean {meant!r}{f', which {remark}' if remark else ''}?"
