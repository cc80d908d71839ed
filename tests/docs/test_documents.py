"""What the documents show runs, and what they list exists.

The list of environment variables is in a private module, because users have the page instead.
"""

from __future__ import annotations

import doctest
import gc
import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import attnplug

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("name", sorted(attnplug.__all__))
def test_examples_in_docstrings_run(name: str) -> None:
    item = getattr(attnplug, name)
    if not (inspect.isroutine(item) or inspect.isclass(item)):
        return
    finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner()
    for test in finder.find(item, name, globs={}):
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0


def test_every_public_name_says_what_it_is() -> None:
    for name in attnplug.__all__:
        item: Any = getattr(attnplug, name)
        if inspect.isroutine(item) or inspect.isclass(item):
            assert item.__doc__, name


def test_the_examples_of_the_readme_run() -> None:
    shared: dict[str, Any] = {"torch": torch, "attnplug": attnplug}
    for block in BLOCKS:
        exec(block, shared)
    attnplug.unregister_impl("mine")
    shared.clear()
    gc.collect()  # a model counts as bound until then
    assert len(BLOCKS) == 2


def test_the_readme_names_every_variable_and_implementation() -> None:
    from attnplug._registry.config import VARIABLES

    ours = [record.name for record in attnplug.list_impls() if record.distribution.startswith("attnplug")]
    assert "torch" in ours
    for name in (*VARIABLES, *ours):
        if name not in ("FA3", "FA4"):
            assert f"`{name}" in README, name


def test_the_architecture_names_every_folder_and_module() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    for module in pkgutil.iter_modules(importlib.import_module("attnplug").__path__):
        if module.name in ("__main__", "_version"):
            continue
        assert f"`{module.name}`" in text, module.name
