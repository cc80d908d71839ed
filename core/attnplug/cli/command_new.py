"""Write a plugin: a package with one kernel that works at once, its tests, and all that publishing takes.

The folder NAME is made in the current one. What is in it: pyproject.toml with the entry point, a light module
that says what the kernel supports, the kernel, tests that run attnplug's checks, README, licence, CI.

examples:
  attnplug new my_kernel
  attnplug new my_kernel --triton --directory ~/src
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import keyword
import re
import shutil
import sys
from pathlib import Path

import attnplug
from attnplug._types import check_own_name
from attnplug.cli import render

HELP = "create a plugin package that works as generated"

# The templates are a package called my_kernel. The suffix keeps tools from taking them for modules of this one.
_NAME, _SUFFIX, _HIDDEN = "my_kernel", "-tpl", "dot_"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="of the implementation, the module, and the folder")
    flavour = parser.add_mutually_exclusive_group()
    for name, made in (("torch", "PyTorch operators; the default"), ("triton", "Triton"), ("cuda", "CUDA")):
        flavour.add_argument(f"--{name}", dest="flavour", action="store_const", const=name, help=f"a kernel in {made}")
    parser.add_argument("--directory", type=Path, default=Path(), help="where to make the folder; by default here")
    parser.set_defaults(flavour="torch")


def run(arguments: argparse.Namespace) -> int:
    folder = arguments.directory / arguments.name
    if (problem := _unusable(arguments.name) or _unwritable(folder)) is not None:
        arguments.fail(problem)
    texts = _texts(arguments.name, arguments.flavour)
    try:
        _write(folder, texts)
    except OSError as error:
        arguments.fail(f"{folder}: could not be written: {error}")
    if arguments.json:
        written = {"name": arguments.name, "flavour": arguments.flavour, "folder": str(folder), "files": list(texts)}
        render.print_json(written)
    else:
        render.put(_next_steps(arguments.name, arguments.flavour, folder))
    return 0


def _unusable(name: str) -> str | None:
    """Return what is wrong with `name`: it is an implementation, a module and, with dashes, a distribution."""
    if not re.fullmatch(r"[A-Za-z](\w*[A-Za-z0-9])?", name, re.ASCII) or keyword.iskeyword(name):
        return f"NAME: {name!r} cannot name a module; write letters, digits and '_', a letter first, as in {_NAME}"
    try:
        check_own_name(name, "NAME")
    except attnplug.SpecError as error:
        return str(error)
    for record in attnplug.list_impls():
        if record.name == name:
            return f"NAME: {name!r} is taken: {record.distribution} has an implementation of this name"
    if name in sys.builtin_module_names or _is_module(name):
        return f"NAME: {name!r} is taken: a module of this name exists, and one would hide the other"
    return None


def _is_module(name: str) -> bool:
    try:
        found = importlib.util.find_spec(name)
    except ValueError:  # a module without a specification, such as __main__
        return True
    return found is not None and found.origin is not None  # any folder in the path is a namespace


def _unwritable(folder: Path) -> str | None:
    if not folder.parent.is_dir():
        return f"--directory: {str(folder.parent)!r} is not a folder"
    if folder.exists() or folder.is_symlink():
        return f"NAME: {str(folder)!r} exists; choose another name or --directory"
    return None


def _texts(name: str, flavour: str) -> dict[str, str]:
    """Return the files of the package: path below its folder to text."""
    templates = Path(__file__).with_name("templates")
    found = _found(templates / "common") | _found(templates / flavour)
    return {_filled(path, name): _filled(text, name) for path, text in sorted(found.items())}


def _found(folder: Path) -> dict[str, str]:
    texts = {}
    for file in folder.rglob(f"*{_SUFFIX}"):
        parts = [re.sub(f"^{_HIDDEN}", ".", part) for part in file.relative_to(folder).parts]
        texts["/".join(parts).removesuffix(_SUFFIX)] = file.read_text(encoding="utf-8")
    return texts


def _filled(text: str, name: str) -> str:
    year = str(datetime.date.today().year)
    text = text.replace("(c) YEAR", f"(c) {year}").replace(
        "attnplug>=VERSION", f"attnplug{_range(attnplug.__version__)}"
    )
    return text.replace(_NAME.replace("_", "-"), name.replace("_", "-")).replace(_NAME, name)


def _range(version: str) -> str:
    """Return the range of versions that a plugin written now is for: names may change with the second number."""
    major, minor = (int(number) for number in version.split(".")[:2])
    return f">={major}.{minor},<{major}.{minor + 1}"


def _write(folder: Path, texts: dict[str, str]) -> None:
    """Write all files or, if one fails, none."""
    folder.mkdir()
    try:
        for path, text in texts.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text, encoding="utf-8", newline="\n")
    except OSError:
        shutil.rmtree(folder)
        raise


def _next_steps(name: str, flavour: str, folder: Path) -> str:
    interpreted = "TRITON_INTERPRET=1 " if flavour == "triton" else ""
    hint = "    # on a GPU: without TRITON_INTERPRET" if interpreted else ""
    return f"""{folder} is written. Next:

  cd {folder}
  pip install -e ".[test]"
  attnplug list
  {interpreted}attnplug check {name}{hint}
  pytest

README.md says what is where, and {name}/impl.py is the kernel."""
