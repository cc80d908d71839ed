"""`hub`: a kernel of the Hugging Face Hub, by repository and version, behind the adapter of the library inside.

Written for `kernels` 0.14 to 0.17 (`kernels/load.py`). Code of the Hub runs in this process, so nothing is
downloaded that was not asked for, by name and pinned: a version, or the full hash of a commit, never a branch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch

import attnplug
from attnplug import Feature, ImplSpec, SDPAParams, SDPBackend
from attnplug_adapters import hub_pins
from attnplug_adapters.flash_attn2 import FlashAttn2
from attnplug_adapters.flash_attn3 import FlashAttn3
from attnplug_adapters.flash_attn4 import FlashAttn4
from attnplug_adapters.hub_pins import VARIABLE, Pinned
from attnplug_adapters.library import Adapter, differences
from attnplug_adapters.sage_attention import SageAttention

ADAPTERS: dict[str, type[Adapter]] = {
    "flash-attn2": FlashAttn2,
    "flash-attn3": FlashAttn3,
    "flash-attn4": FlashAttn4,
    "sage-attention": SageAttention,
}
_PLACES = ("flash_attn_interface", "interface")


class Interface:
    """What is called of `kernels`."""

    @staticmethod
    def get_kernel(repo_id: Any, revision: Any = None, version: Any = None, trust_remote_code: Any = False) -> Any: ...


def hub(
    repository: str,
    *,
    version: int | None = None,
    revision: str | None = None,
    name: str | None = None,
    trust_remote_code: bool = False,
) -> str:
    """Download a kernel of the Hugging Face Hub, unless it is there already, and register it.

    Args:
        repository: such as `kernels-community/flash-attn3`; its last part says which library is inside: flash-attn2,
            flash-attn3, flash-attn4 or sage-attention.
        version: of the kernel, as the Hub counts them.
        revision: in the place of `version`, the full hash of a commit.
        name: of the implementation; by default `hub.` and the last part of the repository.
        trust_remote_code: whether to run code of organisations that `kernels` does not trust.

    Returns:
        The implementation's name, for `impl=`, scopes and the rest.

    Raises:
        TypeError: an argument is of another type.
        ValueError: the repository is of no known library, or neither or both of version and revision are given.
        ModuleNotFoundError: `kernels` is not installed.
        attnplug.PluginError: the kernel has other functions than its adapter was written for.
        attnplug.DuplicateImplementationError: the name is taken; nothing was downloaded.
    """
    pinned = Pinned.of(repository, version, revision)
    name = f"hub.{pinned.library}" if name is None else name
    spec = ImplSpec(  # looked at before anything is downloaded
        name=name,
        kernel="attnplug_adapters.hub_kernels:kernel",
        backend=SDPBackend.FLASH_ATTENTION,
        capabilities=hub_pins.CAPABILITIES[pinned.library],
        priority=-37,
    )
    for record in attnplug.list_impls():
        if record.name == name:
            way_out = "give this one another name with name="
            if record.distribution == "this program":
                way_out += f", or call unregister_impl({name!r}) first"
            raise attnplug.DuplicateImplementationError(name, record.distribution, repository, way_out)
    adapter = load(pinned, trust_remote_code)
    if faults := adapter.unavailable():
        raise attnplug.PluginError(f"{repository}: {'; '.join(faults)}")
    attnplug.register_impl(replace(spec, kernel=adapter))
    return name


def load(pinned: Pinned, trust_remote_code: bool = False) -> Any:
    """Return the adapter of the library in a repository, downloaded if need be."""
    try:
        import kernels
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("hub needs the package kernels: pip install kernels", name=error.name) from error
    if changed := differences(kernels, Interface):
        raise attnplug.PluginError("; ".join(changed))
    module = kernels.get_kernel(
        pinned.repository, revision=pinned.revision, version=pinned.version, trust_remote_code=trust_remote_code
    )
    adapter = ADAPTERS[pinned.library]
    return adapter(_place(module, adapter))


def _place(module: ModuleType, adapter: type[Adapter]) -> ModuleType:
    """Return the module that has what the adapter calls: the kernel's own, or one inside it."""
    inside = [getattr(module, place) for place in _PLACES if hasattr(module, place)]
    fitting = (each for each in (module, *inside) if any(not differences(each, item) for item in adapter.interfaces))
    return next(fitting, inside[0] if inside else module)


class Hub:
    """The kernel that `ATTNPLUG_HUB` names, downloaded when `hub` is first chosen."""

    def __init__(self) -> None:
        self._adapter: Any = None
        self._fault = ""

    @property
    def shape_dependent(self) -> bool:
        """Whether lengths count; asked before anything is downloaded, so for what some release of the library does."""
        try:
            pinned = Pinned.from_environment()
        except ValueError:  # `unavailable` tells
            return False
        return pinned is not None and hasattr(ADAPTERS[pinned.library], "shape_dependent")

    def unavailable(self) -> str | tuple[str, ...]:
        """Return why there is no kernel; the first question downloads the one that was asked for."""
        if self._adapter is None and not self._fault:
            try:
                pinned = Pinned.from_environment()
                self._adapter = None if pinned is None else load(pinned)
            except Exception as error:  # of the network, of the Hub, of the kernel: a reason, whatever it is
                self._fault = f"{VARIABLE}: {error}"
        if self._fault:
            return self._fault
        if self._adapter is None:
            return f"no kernel is selected: set {VARIABLE}=repository@version, or call attnplug_adapters.hub(...)"
        return self._adapter.unavailable()

    def lacks(self, device: torch.device, dtype: torch.dtype) -> Mapping[Feature, str]:
        """Ask the adapter."""
        return self._adapter.lacks(device, dtype) if not self.unavailable() else {}  # asked before unavailable

    def supports(self, params: SDPAParams) -> Any:
        """Ask the adapter."""
        return self._adapter.supports(params)

    def notes(self, params: SDPAParams) -> Any:
        """Ask the adapter."""
        return self._adapter.notes(params) if hasattr(self._adapter, "notes") else None

    def forward(self, params: SDPAParams) -> Any:
        """Run the adapter's forward."""
        return self._adapter.forward(params)

    def backward(self, params: SDPAParams, *tensors: Any) -> Any:
        """Run the adapter's backward."""
        return self._adapter.backward(params, *tensors)


kernel = Hub()
