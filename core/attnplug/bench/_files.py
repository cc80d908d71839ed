"""Cases from a file of the user's, YAML or TOML, so that the shapes of one's own model need no program."""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path
from typing import Any

from attnplug._arguments import as_path
from attnplug.bench._captured import Cases
from attnplug.bench._cases import Case, check_fields
from attnplug.bench._errors import BenchError, needed
from attnplug.bench._sets import default_device, default_dtype
from attnplug.bench._validate import LENGTHS


def read_cases(path: str | Path, *, device: str | None = None, dtype: str | None = None) -> list[Case] | Cases:
    """Return the cases of a `.yaml`, `.yml` or `.toml` file, or of a `.json` file that `attnplug.capture()` gave.

    What a capture saved comes back as `Cases`, with counts. Any other file has `cases` (in TOML `[[cases]]`), each a
    mapping of fields of `Case`, and maybe `defaults` with fields for all of them. A field that is a list of values
    stands for a case with each of them; `window` and the lengths of packed sequences, lists themselves, for a list of
    lists. `length` sets queries and keys at once.

    Args:
        path: of the file.
        device: of every case, whatever the file says; by default what it says, else a GPU if there is one,
            else the CPU.
        dtype: likewise; by default what the file says, else bfloat16 on a GPU and float32 on the CPU.

    Raises:
        BenchError: the file cannot be read, or says something that no case is.
    """
    path = as_path("path", path)
    forced = {name: value for name, value in (("device", device), ("dtype", dtype)) if value is not None}
    if path.suffix.lower() == ".json":
        return _captured(path, forced)
    content = _load(path)
    if not isinstance(content, dict) or not isinstance(content.get("cases"), list):
        raise BenchError(f"{path}: expected a list called 'cases', got {_kind(content)}")
    for name in content:
        if name not in ("cases", "defaults"):
            raise BenchError(f"{path}: expected 'cases' and 'defaults', got {name!r}")
    defaults = content.get("defaults", {})
    cases = []
    for number, given in enumerate(content["cases"], 1):
        where = f"{path}: case {number}"
        for part in (defaults, given):
            check_fields(part, where, also=("length",))
            if "length" in part and (clash := [name for name in ("queries", "keys") if name in part]):
                raise BenchError(f"{where}: length: sets queries and keys at once; leave out {' and '.join(clash)}")
        merged = _merged(defaults, given)
        if "length" in merged and merged.get("lengths_q") is not None:
            raise BenchError(f"{where}: length: packed sequences have those of lengths_q; leave out one of the two")
        for each in _expanded({**merged, **forced}):
            each.setdefault("device", default_device())
            each.setdefault("dtype", default_dtype(str(each["device"])))
            cases.append(Case.from_dict(each, where))
    if not cases:
        raise BenchError(f"{path}: has no cases")
    return _distinct(cases)


def _captured(path: Path, forced: dict[str, Any]) -> Cases:
    """Return the cases of a capture, with the fields that are forced."""
    found, cases = Cases.load(path), Cases()
    for case, count in found.items():
        cases[case.but(**forced)] += count
    cases.left_out.update(found.left_out)
    return cases


def _load(path: Path) -> Any:
    suffix = path.suffix.lower()
    if suffix not in (".yaml", ".yml", ".toml"):
        raise BenchError(f"{path}: expected a file that ends in .yaml, .yml, .toml or .json")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BenchError(f"{path}: cannot be read: {getattr(error, 'strerror', error)}") from error
    parser = _toml() if suffix == ".toml" else needed("yaml", f"reading {path}").safe_load
    try:
        return parser(text)
    except Exception as error:  # the two libraries have errors of their own
        raise BenchError(f"{path}: is not {suffix[1:].upper()}: {error}") from error


def _toml() -> Any:
    """The standard library's parser, which came with Python 3.11, or the package that it was made from."""
    return needed("tomllib" if sys.version_info >= (3, 11) else "tomli", "reading TOML").loads


def _merged(defaults: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a case, to which its own come before the defaults, and `length` is both that it sets.

    Packed sequences of its own say how many queries and keys there are, whatever the defaults do.
    """
    if given.get("lengths_q") is not None:
        defaults = {name: value for name, value in defaults.items() if name not in ("length", "queries", "keys")}
    elif "length" in given:
        defaults = {name: value for name, value in defaults.items() if name not in ("queries", "keys")}
    elif "length" in defaults and ("queries" in given or "keys" in given):
        length = defaults["length"]
        defaults = {name: value for name, value in defaults.items() if name != "length"}
        defaults |= {"queries": length, "keys": length}
    return {**defaults, **given}


def _expanded(given: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a mapping for each combination of the values of fields that are lists."""
    given = {("queries" if name == "length" else name): value for name, value in given.items()}  # and keys follow
    choices = {name: _values(name, value) for name, value in given.items()}
    return [dict(zip(choices, combination, strict=True)) for combination in product(*choices.values())]


def _values(name: str, value: Any) -> list[Any]:
    if name in ("window", *LENGTHS):  # a list itself
        return value if isinstance(value, list) and value and isinstance(value[0], list) else [value]
    return value if isinstance(value, list) else [value]


def _distinct(cases: list[Case]) -> list[Case]:
    """Give the cases of a list of values, which share a name, names that tell them apart."""
    names = [case.name for case in cases]
    return [
        case
        if names.count(case.name) == 1 or case.name == case.label()
        else case.but(name=f"{case.name} {case.label()}")
        for case in cases
    ]


def _kind(content: Any) -> str:
    return f"the fields {', '.join(map(str, content))}" if isinstance(content, dict) else type(content).__name__
