"""The site as `make docs` builds it, once for all tests that look at it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from filelock import FileLock

import pages


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the site, which is built by the process of this run that asks first."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder = shared / "site"
    with FileLock(shared / "site.lock"):
        if not folder.exists():
            done = pages.build(folder)
            assert done.returncode == 0, done.stderr
    return folder
