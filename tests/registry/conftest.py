"""A folder of fake installed distributions, in which a new interpreter finds its plugins."""

from __future__ import annotations

from pathlib import Path

import pytest

from packages import Site


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A folder that holds one healthy plugin."""
    site = Site(tmp_path / "site")
    site.install_healthy()
    return site
