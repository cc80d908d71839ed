"""Who watches what runs: verification, metrics, summaries.

`begin` puts in place what the environment, and a program's OpenTelemetry, ask for from the first call on.
"""

from __future__ import annotations

import sys

from attnplug._registry.config import get_config
from attnplug._registry.registry import Registry
from attnplug._selection.state import REFERENCE, when_started


def begin(registry: Registry) -> None:
    """Watch from now on as the environment says, and tell OpenTelemetry's providers if the program has set any."""
    rate = get_config().verify
    if rate:
        from attnplug._watch.verification import verify

        verify(rate, REFERENCE).start()
    if "opentelemetry" in sys.modules:
        from attnplug._watch.telemetry import instrument_if_set

        instrument_if_set()


when_started(begin)
