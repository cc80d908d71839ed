"""A driver that writes down what is launched, in place of Triton's."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    from written_launches import stand_in  # which the tests import, too, and skip where there is no Triton

    return stand_in(monkeypatch)
