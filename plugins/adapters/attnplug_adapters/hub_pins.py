"""Which kernel of the Hugging Face Hub is asked for; read when implementations are listed, so nothing is imported."""

from __future__ import annotations

import os
import re
import warnings
from dataclasses import dataclass

from attnplug import Capabilities, ImplSpec, PluginWarning, SDPBackend
from attnplug_adapters import specs

VARIABLE = "ATTNPLUG_HUB"
CAPABILITIES = {
    "flash-attn2": specs.FLASH_ATTN2,
    "flash-attn3": specs.FLASH_ATTN3,
    "flash-attn4": specs.FLASH_ATTN4,
    "sage-attention": specs.SAGE_ATTENTION,
}
_HASH = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Pinned:
    """A repository of the Hub at a version, or at a commit."""

    repository: str
    version: int | None = None
    revision: str | None = None

    @property
    def library(self) -> str:
        """The last part of the repository, which says what is inside."""
        return self.repository.rpartition("/")[2]

    @classmethod
    def of(cls, repository: str, version: int | None, revision: str | None) -> Pinned:
        """Return a repository that is pinned.

        Raises:
            TypeError: an argument is of another type.
            ValueError: it is of no known library, not pinned, or pinned to a version below 1.
        """
        if not isinstance(repository, str):
            raise TypeError(
                f"repository: expected a string such as 'kernels-community/flash-attn3', got {repository!r}"
            )
        if version is not None and (isinstance(version, bool) or not isinstance(version, int)):
            raise TypeError(f"version: expected an integer, as the Hub counts them, got {version!r}")
        if version is not None and version < 1:
            raise ValueError(f"version: expected an integer from 1 on, as the Hub counts them, got {version}")
        if revision is not None and not isinstance(revision, str):
            raise TypeError(f"revision: expected the hash of a commit as a string, got {revision!r}")
        pinned = cls(repository, version, revision)
        if "/" not in repository or pinned.library not in CAPABILITIES:
            known = ", ".join(CAPABILITIES)
            raise ValueError(f"repository: expected owner/name with the name one of {known}; got {repository!r}")
        if (version is None) == (revision is None):
            raise ValueError("version, revision: give one of them, so that the code that runs is the code you chose")
        if revision is not None and not _HASH.fullmatch(revision):
            raise ValueError(f"revision: expected the full hash of a commit, 40 hexadecimal digits; got {revision!r}")
        return pinned

    @classmethod
    def from_environment(cls) -> Pinned | None:
        """Return what `ATTNPLUG_HUB=owner/name@version` asks for; None if it is not set.

        Raises:
            ValueError: it says something else.
        """
        value = os.environ.get(VARIABLE, "")
        if not value:
            return None
        repository, _, pin = value.partition("@")
        if pin.isdecimal() and len(pin) < 40:
            return cls.of(repository, int(pin), None)
        if not pin:
            raise ValueError(f"expected owner/name@version or owner/name@commit, got {value!r}")
        return cls.of(repository, None, pin)


def hub_spec() -> ImplSpec:
    """Return the specification of `hub`: that of the library in the repository that is asked for.

    A value that means nothing breaks `hub` alone, as a broken kernel would: a warning that names the variable, and an
    error where `hub` is named.

    Raises:
        ValueError: it means nothing, under `ATTNPLUG_STRICT=1`.
    """
    try:
        pinned = Pinned.from_environment()
    except ValueError as error:  # the kernel says so, too, whenever it is asked for
        if os.environ.get("ATTNPLUG_STRICT") == "1":
            raise ValueError(f"{VARIABLE}: {error}") from error
        warnings.warn(f"{VARIABLE}: {error}; hub is unavailable", PluginWarning, stacklevel=2)
        pinned = None
    capabilities = Capabilities(devices=("cuda",)) if pinned is None else CAPABILITIES[pinned.library]
    return ImplSpec(
        name="hub",
        kernel="attnplug_adapters.hub_kernels:kernel",
        backend=SDPBackend.FLASH_ATTENTION,
        capabilities=capabilities,
        priority=-37,
        requires=("kernels",),
        install="pip install kernels",
    )
