"""Files of measured choices: JSON with a format number, replaced whole, and never with less than was in it.

Where they lie by default is the operating system's business: `platformdirs` knows it, has no dependencies, and is
imported only when a default place is asked for. `filelock`, which torch itself depends on, keeps two processes that
save at once from losing each other's choices.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from math import inf
from pathlib import Path
from typing import Any

from attnplug._errors import ChoicesError
from attnplug._selection.choice_tables import Choice, Kind, Table, joined

FORMAT = 1
_PATIENCE = 30.0
_KIND = Kind.__annotations__
_INTEGERS = ("head_size", "value_head_size", "group", "batch_heads", "queries", "keys")


def default_place() -> Path:
    """Return where this user's choices lie: `choices.json` in the user's cache folder."""
    from platformdirs import user_cache_path

    return user_cache_path("attnplug", appauthor=False) / "choices.json"


def read(path: Path) -> tuple[tuple[Table, ...], tuple[str, ...]]:
    """Return the tables in a file, and the notes of the measurement that was saved last.

    Raises:
        ChoicesError: there is none, it cannot be read, or it holds no choices in a format that is known.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ChoicesError(
            f"{path}: there is no such file; `attnplug tune -o {path}` measures this machine and writes it"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ChoicesError(f"{path}: cannot be read: {getattr(error, 'strerror', error)}") from error
    try:
        given = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ChoicesError(f"{path}: is not JSON ({error}), so it holds no measured choices") from error
    return from_plain(given, str(path))


def add(tables: tuple[Table, ...], notes: tuple[str, ...], path: Path) -> Path:
    """Add tables to those in a file, which may not be there yet. Notes replace others, which would grow untrue.

    Raises:
        ChoicesError: it cannot be written, or what is there holds no choices: nothing is overwritten then.
    """
    path = _file(path)
    with _locked(path):
        together = joined((*read(path)[0], *tables)) if path.exists() else tables
        _replace(path, json.dumps(as_plain(together, notes), indent=1) + "\n")
    return path


def check_writable(path: Path) -> None:
    """Raise, before anything is measured, what saving there would raise.

    Raises:
        ChoicesError: the file cannot be written, or holds something else.
    """
    path = _file(path)
    with _locked(path):
        if path.exists():
            read(path)
        _temporary(path).unlink()


def _file(path: Path) -> Path:
    """Return the file that a link leads to: it is replaced, not the link. A folder or a device cannot be."""
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise ChoicesError(
            f"{path}: is not a file; choose another place: attnplug tune -o FILE, or Choices.save('FILE')"
        )
    return path


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file, in whose folder new files can be made; an error of the system says what to do."""
    from filelock import FileLock, Timeout

    lock = path.with_name(f"{path.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock, timeout=_PATIENCE):
            yield
    except Timeout as error:
        raise ChoicesError(
            f"{path}: another process has held {lock} for {_PATIENCE:.0f} s; wait for it to end, or write to another "
            f"file: files of choices can be merged later"
        ) from error
    except (OSError, NotImplementedError) as error:
        raise ChoicesError(
            f"{path}: cannot be written ({error}); choose another place: attnplug tune -o FILE, or Choices.save('FILE')"
        ) from error


def _temporary(path: Path) -> Path:
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    return Path(name)


def _replace(path: Path, text: str) -> None:
    """Put a new file in the place of the old one, all at once."""
    new = _temporary(path)
    try:
        new.write_text(text, encoding="utf-8")
        new.chmod(0o644)  # mkstemp makes files that only their owner can read
        new.replace(path)
    except BaseException:  # an interrupt, too, must leave no file
        new.unlink(missing_ok=True)
        raise


def as_plain(tables: tuple[Table, ...], notes: tuple[str, ...]) -> dict[str, Any]:
    """Return tables and notes as JSON has them."""
    return {
        "format": FORMAT,
        "tables": [
            {
                "device": one.device,
                "capability": one.capability,
                "versions": dict(one.versions),
                "choices": [
                    {**asdict(choice), "kind": {**choice.kind._asdict(), "features": list(choice.kind.features)}}
                    for choice in one.choices
                ],
            }
            for one in tables
        ],
        "notes": list(notes),
    }


def from_plain(given: Any, where: str) -> tuple[tuple[Table, ...], tuple[str, ...]]:
    """Return the tables and notes that `as_plain` wrote.

    Raises:
        ChoicesError: it did not write that, or another version did; `where` stands before the message.
    """
    if not isinstance(given, dict) or "format" not in given or "tables" not in given:
        raise ChoicesError(f"{where}: holds no measured choices; `attnplug tune` and Choices.save() write such files")
    if given["format"] != FORMAT:
        raise ChoicesError(
            f"{where}: has format {given['format']!r}, and this attnplug reads format {FORMAT}; measure again into "
            f"another file (attnplug tune -o FILE), or use the version of attnplug that wrote it"
        )
    try:
        return tuple(_table(one) for one in given["tables"]), _notes(given.get("notes", []))
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise ChoicesError(f"{where}: is damaged ({error!r}); remove it and measure again: attnplug tune") from error


def _table(given: dict[str, Any]) -> Table:
    versions = {str(name): None if version is None else str(version) for name, version in given["versions"].items()}
    choices = tuple(_choice(one) for one in given["choices"])
    return Table(str(given["device"]), str(given["capability"]), versions, choices)


def _notes(given: Any) -> tuple[str, ...]:
    if type(given) is not list or not all(type(note) is str for note in given):
        raise ValueError(f"notes: {given!r}")
    return tuple(given)


def _choice(given: dict[str, Any]) -> Choice:
    kind = {name: given["kind"][name] for name in _KIND}
    for name in _INTEGERS:
        if type(kind[name]) is not int or kind[name] < 1:
            raise ValueError(f"kind: {name} is {kind[name]!r}")
    for name, expected in (("dtype", str), ("gradients", bool)):
        if type(kind[name]) is not expected:
            raise ValueError(f"kind: {name} is {kind[name]!r}")
    kind["features"] = tuple(map(str, kind["features"]))
    names = {name: str(given[name]) for name in ("impl", "default", "created")}
    times = {name: float(given[name]) for name in ("seconds", "default_seconds")}
    if not all(0 < time < inf for time in times.values()):
        raise ValueError(f"times: {times}")
    return Choice(Kind(**kind), **names, **times)  # type: ignore[arg-type]  # a dictionary has one type for all values
