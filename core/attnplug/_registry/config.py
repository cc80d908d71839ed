"""The environment variables, read once and checked in one place.

An invalid value is an error that names the variable: a silently ignored typo in `ATTNPLUG_STRICT` costs its
author an afternoon.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from attnplug._errors import ConfigError, did_you_mean

VARIABLES = {
    "ATTNPLUG_IMPL": "names of the implementations to prefer, separated by commas",
    "ATTNPLUG_CHOICES": "a file of measured choices, or auto: those that attnplug tune saved for this user",
    "ATTNPLUG_LOAD": "the only entry points that may load, by name; empty: none",
    "ATTNPLUG_DISABLE": "entry points that never load, by name",
    "ATTNPLUG_STRICT": "1: a broken plugin raises instead of warning",
    "ATTNPLUG_TRACE": "1: log each decision, on stderr",
    "ATTNPLUG_HUB": "of the plugin adapters: the kernel of the Hugging Face Hub that hub runs, repository@version",
    "ATTNPLUG_VERIFY": "a rate from 0 to 1: the share of calls to compute again by math_ref, and to compare",
}


@dataclass(frozen=True)
class Config:
    """What the environment says. `load` is `None` when everything may load."""

    impl: tuple[str, ...] = ()
    choices: str = ""
    load: frozenset[str] | None = None
    disable: frozenset[str] = frozenset()
    strict: bool = False
    trace: bool = False
    verify: float = 0.0


@cache
def get_config() -> Config:
    """Return the configuration of this process; the environment is read at the first call.

    Raises:
        ConfigError: a variable has a value that means nothing, or no such variable exists.
    """
    return read_config(os.environ)


def read_config(environ: Mapping[str, str]) -> Config:
    """Check and read the variables of `environ` that begin with `ATTNPLUG_`."""
    for name in environ:
        if name.startswith("ATTNPLUG_") and name not in VARIABLES:
            raise ConfigError(
                f"{name}: no such variable{did_you_mean(name, VARIABLES) or ';'} known: {', '.join(sorted(VARIABLES))}"
            )
    load = environ.get("ATTNPLUG_LOAD")
    return Config(
        impl=_names("ATTNPLUG_IMPL", environ),
        choices=environ.get("ATTNPLUG_CHOICES", "").strip(),
        load=None if load is None else frozenset(_names("ATTNPLUG_LOAD", environ)),
        disable=frozenset(_names("ATTNPLUG_DISABLE", environ)),
        strict=_switch("ATTNPLUG_STRICT", environ),
        trace=_switch("ATTNPLUG_TRACE", environ),
        verify=_rate("ATTNPLUG_VERIFY", environ),
    )


def _names(variable: str, environ: Mapping[str, str]) -> tuple[str, ...]:
    value = environ.get(variable, "")
    if not value.strip():
        return ()
    names = [part.strip() for part in value.split(",")]
    if not all(names):
        raise ConfigError(f"{variable}: {value!r} has an empty name; write names separated by single commas")
    return tuple(names)


def _switch(variable: str, environ: Mapping[str, str]) -> bool:
    value = environ.get(variable, "")
    if value in ("", "0"):
        return False
    if value == "1":
        return True
    raise ConfigError(f"{variable}: expected 0 or 1, got {value!r}")


def _rate(variable: str, environ: Mapping[str, str]) -> float:
    value = environ.get(variable, "").strip()
    try:
        rate = float(value or 0)
    except ValueError:
        rate = -1.0
    if not 0 <= rate <= 1:
        raise ConfigError(f"{variable}: expected a rate from 0 to 1, such as 0.01, got {value!r}")
    return rate
