"""The commands that fix what is wrong, in one place: `list_impls()`, `explain` and `attnplug doctor` show them.

A remedy is a line for a shell. Where no command helps there is none: nothing installs a GPU.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from contextlib import suppress

from attnplug._registry.config import get_config
from attnplug._registry.machine import lacks_gpu_build


def reinstalled(distribution: str) -> str:
    """Return what brings a later release of a distribution, or repairs a broken installation of it.

    It comes from where it came from: the package index may have another one of this name, or none. Nothing is to be
    installed where the installation is editable, because it runs the source, which is what must be changed.
    """
    came_from = distribution
    with suppress(Exception):  # it came from the index, or is so broken that nobody knows
        from importlib_metadata import distribution as installed

        origin = json.loads(installed(distribution).read_text("direct_url.json") or "")
        if origin.get("dir_info", {}).get("editable"):
            return ""
        vcs, folder = origin.get("vcs_info", {}), origin.get("subdirectory")
        url = f"{vcs['vcs']}+{origin['url']}" if vcs else origin["url"]
        branch = vcs.get("requested_revision")
        came_from = (
            f"{distribution} @ {url}{f'@{branch}' if branch else ''}{f'#subdirectory={folder}' if folder else ''}"
        )
    return f"pip install --upgrade --force-reinstall {shlex.quote(came_from)}"


def gpu_build() -> str:
    """Return what brings a PyTorch that can use this machine's GPU; empty if there is no GPU, or PyTorch can."""
    return "pip install --force-reinstall torch" if lacks_gpu_build() else ""


def left_out(plugin: str) -> str:
    """Return what keeps a plugin from loading, besides those that are kept from it already."""
    return _setting("ATTNPLUG_DISABLE", {*get_config().disable, plugin})


def allowed_again(names: frozenset[str]) -> str:
    """Return what lets the plugin load that has these names and that the environment forbids."""
    config = get_config()
    commands = []
    if config.disable & names:
        others = config.disable - names
        commands.append(_setting("ATTNPLUG_DISABLE", others) if others else "unset ATTNPLUG_DISABLE")
    if config.load is not None and not config.load & names:
        commands.append(_setting("ATTNPLUG_LOAD", {*config.load, min(names, key=len)}))
    return " && ".join(commands)


def _setting(variable: str, names: Iterable[str]) -> str:
    return f"export {variable}={shlex.quote(','.join(sorted(names)))}"
