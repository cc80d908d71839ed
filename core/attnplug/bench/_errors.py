"""What can be wrong with a benchmark before anything is measured, and libraries that are asked for when needed."""

from __future__ import annotations

import importlib
from typing import Any

from attnplug._errors import AttnplugError


class BenchError(AttnplugError, ValueError):
    """A case, a file or a setting that cannot be measured or written; the message says which and why."""


def needed(module: str, purpose: str) -> Any:
    """Import a library of the extra `attnplug[bench]` when it is first needed, because few need it.

    Raises:
        BenchError: it is not installed; says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != module.partition(".")[0]:
            raise  # it is installed, but something that it needs is not
        name = {"yaml": "PyYAML"}.get(module.partition(".")[0], module.partition(".")[0])
        raise BenchError(f"{purpose} needs {name}, not installed; pip install 'attnplug[bench]'") from error
