"""A time of the test's own, and a machine that is idle: what is tested is never how long something takes."""

from __future__ import annotations

import pytest

from bench_kernels import register, ticking

__all__ = ["register", "ticking"]  # fixtures


@pytest.fixture(autouse=True)
def share(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Which share of the processor's time this program gets: all of it, unless a test says otherwise."""
    got = {"share": 1.0}
    monkeypatch.setattr("attnplug.tuning._machine.share_of_processor", lambda threads: got["share"])
    return got
