"""Before any call: the kernel itself."""

from __future__ import annotations

from attnplug._registry.discovery import get_registry
from attnplug.testing._checks import check
from attnplug.testing._failure import failure
from attnplug.testing._subject import Subject


@check(dtypes="first")
def check_kernel_loads(subject: Subject) -> None:
    """The kernel can be imported, and has the functions that attnplug calls."""
    entry = get_registry().get(subject.name)
    if entry.load() is None:
        raise failure(None, entry.broken)
    subject.ran += 1
