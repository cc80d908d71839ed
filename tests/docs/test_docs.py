"""The documentation builds without a warning, names everything that is public, and what it shows is so.

The lists of hooks and of environment variables are in private modules, because users have the page instead.
"""

from __future__ import annotations

import ast
import builtins
import doctest
import enum
import html
import importlib
import inspect
import pkgutil
import re
import typing
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import attnplug
import attnplug.integrations
import pages
from attnplug import Feature
from attnplug._registry import hooks as hookspecs
from attnplug._registry.config import VARIABLES
from attnplug.cli import COMMANDS, build_parser
from process_state import registered

pytest.importorskip("mkdocs", reason="the documentation is built with mkdocs")

ROOT = Path(__file__).resolve().parents[2]
INTERNAL = {"attnplug.builtin", "attnplug.cli", "attnplug.integrations"}  # without public names of their own
MODULES = [
    "attnplug",
    *(
        module.name
        for package in (attnplug, attnplug.integrations)
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
        if not module.name.rpartition(".")[2].startswith("_") and module.name not in INTERNAL
    ),
]
BLOCKS = {
    name: {block.language for block in pages.blocks(name)}
    for name in sorted(str(path.relative_to(pages.DOCS)) for path in pages.DOCS.rglob("*.md"))
}
RUN = [name for name, languages in BLOCKS.items() if languages and ("/" not in name or "python" in languages)]
"""Those in folders show besides what nobody can install here."""
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


@cache
def anchors(site: Path) -> frozenset[str]:
    """Return the names of all headings of all pages."""
    return frozenset(
        html.unescape(name) for page in site.rglob("*.html") for name in re.findall(r'\bid="([^"]+)"', page.read_text())
    )


def text_of(page: Path) -> str:
    """Return what a reader sees of a page."""
    return html.unescape(re.sub(r"<[^>]+>", "", page.read_text()))


def public_names(module: ModuleType) -> list[str]:
    if hasattr(module, "__all__"):
        return list(module.__all__)
    own = (name for name, item in vars(module).items() if getattr(item, "__module__", "") == module.__name__)
    return [name for name in own if not name.startswith("_")]


def undocumented(names: Iterable[str], site: Path) -> list[str]:
    """Return the dotted names that are no heading of the reference."""
    return [name for name in names if name not in anchors(site)]


def undescribed(function: Any) -> list[str]:
    """Return the parameters of which a docstring says nothing; the reference shows what it says."""
    described = re.findall(r"^ +\*{0,2}(\w+): ", inspect.getdoc(function) or "", re.MULTILINE)
    return [name for name in inspect.signature(function).parameters if name not in described]


def hooks(module: Any) -> list[Any]:
    return [item for name, item in vars(module).items() if name.startswith("attnplug_")]


def test_the_site_builds_without_a_warning(site):
    assert (site / "index.html").is_file()
    assert not list(site.rglob("generate.py"))


def test_nothing_is_fetched_to_show_a_page(site):
    for page in site.rglob("*.html"):
        fetched = re.findall(r'<(?:script|link|img)\b[^>]*?(?:src|href)="(https?:[^"]+)"', page.read_text())
        assert not fetched, (page.name, fetched)


@pytest.mark.parametrize(
    ("text", "nav", "mistakes"),
    [
        ("::: attnplug.nothing", "[index.md]", ["attnplug.nothing"]),
        (
            "[away](nowhere.md), [away](index.md#nowhere)",
            "[index.md, missing.md]",
            ["'nowhere.md'", "'index.md#nowhere'", "'missing.md'"],
        ),
    ],
    ids=["reference", "links"],
)
def test_a_mistake_in_a_page_stops_the_build(tmp_path, text, nav, mistakes):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/index.md").write_text(f"# A page\n\n{text}\n")
    config = tmp_path / "mkdocs.yml"
    config.write_text(f"INHERIT: {ROOT / 'mkdocs.yml'}\ndocs_dir: docs\nhooks: []\nextra_css: []\nnav: {nav}\n")
    done = pages.build(tmp_path / "site", config)
    assert done.returncode != 0
    for mistake in mistakes:
        assert re.search(f"^(WARNING|ERROR) .*{mistake}", done.stderr, re.MULTILINE), done.stderr


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_is_in_the_reference(site, name):
    names = public_names(importlib.import_module(name))
    assert names
    assert undocumented([f"{name}.{each}" for each in names], site) == []


def test_a_public_name_that_is_not_in_the_reference_would_be_found(site):
    assert undocumented(["attnplug.bind", "attnplug.unbind"], site) == ["attnplug.unbind"]


@pytest.mark.parametrize("name", MODULES)
def test_every_argument_of_a_public_function_is_described(name):
    module = importlib.import_module(name)
    functions = [getattr(module, each) for each in public_names(module)]
    missing = {each.__name__: undescribed(each) for each in functions if inspect.isfunction(each)}
    assert {function: names for function, names in missing.items() if names} == {}


def test_bases_that_the_reference_shows_can_be_looked_up(site):
    """In the reference or in Python's: what handles have in common is in neither."""
    lines = [line for page in site.rglob("*.html") for line in re.findall(r"^\s*Bases:.*", text_of(page), re.MULTILINE)]
    bases = {name for line in lines for name in re.findall(r"[\w.]+", line.partition("Bases:")[2])}
    public = {name.rpartition(".")[2] for name in anchors(site)}
    python = {name for module in (builtins, enum, typing) for name in vars(module)}
    assert "AttnplugError" in bases and {name.rpartition(".")[2] for name in bases} <= public | python


def test_every_example_of_a_docstring_is_shown_as_code(site):
    for file in site.rglob("*.html"):
        quoted = "<blockquote>" in file.read_text()  # `>>>` without code around it
        assert not quoted, f"{file.name}: write `Examples:` over an example, not `Example:`"


@pytest.mark.parametrize("name", [name for name in MODULES if name != "attnplug"])
def test_examples_in_docstrings_run(name):
    """Those of attnplug itself are run, each by itself, in test_documents.py."""
    module = importlib.import_module(name)
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner()
    for each in public_names(module):
        item = getattr(module, each)
        for example in finder.find(item, each, globs={}) if callable(item) else ():
            runner.run(example)
    results = runner.summarize(verbose=False)
    assert results.attempted > 0 and results.failed == 0


def test_every_hook_and_every_argument_of_one_is_in_the_reference(site):
    assert hooks(hookspecs)
    for hook in hooks(hookspecs):
        assert undocumented([f"{hookspecs.__name__}.{hook.__name__}"], site) == []
        assert undescribed(hook) == []


def test_an_argument_that_is_not_described_would_be_found():
    def attnplug_new_hook(config, entry):
        """Do something.

        Args:
            config: what is so.
        """

    (hook,) = hooks(SimpleNamespace(attnplug_new_hook=attnplug_new_hook, other=None))
    assert undescribed(hook) == ["entry"]


def test_every_environment_variable_is_in_the_reference(site):
    page = text_of(site / "reference/environment.html")
    for name, meaning in VARIABLES.items():
        assert name in page and meaning in page, name


def test_every_command_and_option_is_in_the_reference(site):
    page, parser = text_of(site / "reference/command-line.html"), build_parser()
    (action,) = (action for action in parser._actions if hasattr(action, "choices") and action.choices)
    assert tuple(action.choices) == COMMANDS
    for name, command in action.choices.items():
        assert name in anchors(site)
        for option in command._actions:
            for written in option.option_strings or [option.metavar]:
                assert re.search(rf"(?<![\w-]){re.escape(written)}(?![\w-])", page), (name, written)


def test_every_feature_is_in_the_reference_and_in_the_table_of_implementations(site):
    reference, table = (text_of(site / page) for page in ("reference/plugins.html", "implementations.html"))
    for feature in Feature:
        assert feature.name in table
        assert feature.name in reference and feature.value in reference


def test_every_implementation_is_in_the_table(site):
    table = text_of(site / "implementations.html")
    ours = [record for record in attnplug.list_impls() if record.distribution.startswith("attnplug")]
    assert ours
    for record in ours:
        assert record.name in table


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_links_of_the_documents_beside_the_site_lead_somewhere(name):
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / name).read_text())
    assert links and [link for link in links if not (ROOT / link).exists()] == []


def test_troubleshooting_shows_a_message_of_every_error_and_warning():
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## )", page("troubleshooting.md"), re.MULTILINE | re.DOTALL))
    for module in map(importlib.import_module, MODULES):
        for name in public_names(module):
            item = getattr(module, name)
            if inspect.isclass(item) and issubclass(item, Exception) and name != "AttnplugError":
                assert "```text\n" in sections[name], name


def test_the_steps_of_a_plugin_are_as_many_as_the_page_says():
    text = page("first-plugin.md")
    steps = [int(number) for number in re.findall(r"^## Step (\d+): ", text, re.MULTILINE)]
    assert steps == list(range(1, len(steps) + 1))
    assert f"in {NUMBERS[len(steps)]} steps" in text


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "adapters/flex.md" else ()) for name in RUN]
)
def test_what_a_page_shows_runs_and_prints_what_it_says(name, tmp_path):
    before = registered()
    assert pages.Page(name, tmp_path, packages=("my_kernel",)).run() > 0
    assert registered() == before, "a page takes back what it registers"


@pytest.mark.parametrize("name", RUN)
def test_a_page_imports_the_modules_that_it_names(name):
    """Else it runs where something before has imported them, and not for its readers."""
    imported, named = set(), set()
    for node in (node for block in python_of(name) for node in ast.walk(ast.parse(block))):
        if isinstance(node, ast.Import):
            imported |= {each.name for each in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
        elif isinstance(node, ast.Attribute):
            named.add(ast.unparse(node))
    there = {"attnplug", *(f"attnplug.{each}" for each in attnplug.__all__)}
    assert named & set(MODULES) - there <= imported


def test_what_is_collected_while_a_page_runs_is_not_shown(tmp_path, monkeypatch):
    """Python warns of a file that nobody has closed, at some later time."""
    (tmp_path / "page.md").write_text("```python\nimport gc\n\nprint(gc.collect() > 0)\n```\n\n```text\nTrue\n```\n")
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(pages, "DOCS", tmp_path)
    lost: list[Any] = [(tmp_path / "page.md").open()]
    lost.append(lost)
    del lost
    assert pages.Page("page.md", tmp_path / "folder").run() == 2


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("```python\nprint(1)\n```\n\n```text\n2\n```\n", "wrong.md, line 8 shows\n2\nbut this came:\n1"),
        ("```python\n1 / 0\n```\n\n```text\nnothing\n```\n", "ZeroDivisionError: division by zero"),
        ("```sh\necho no; exit 3\n```\n", "status 3\nno"),
        ("```sh\npip install nothing-of-this-name\n```\n", "nothing-of-this-name"),
        ("```ruby\n1\n```\n", "nobody runs a block of 'ruby'"),
    ],
)
def test_a_page_that_is_wrong_is_found_with_its_line(tmp_path, monkeypatch, text, complaint):
    (tmp_path / "wrong.md").write_text(f"# Wrong\n\n{text}")
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(pages, "DOCS", tmp_path)
    with pytest.raises(AssertionError, match=re.escape(complaint)):
        pages.Page("wrong.md", tmp_path / "folder").run()


def test_an_exception_that_a_page_does_not_show_fails_it(tmp_path, monkeypatch):
    (tmp_path / "wrong.md").write_text("```python\n1 / 0\n```\n")
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(pages, "DOCS", tmp_path)
    with pytest.raises(ZeroDivisionError):
        pages.Page("wrong.md", tmp_path / "folder").run()


def page(name: str) -> str:
    return (pages.DOCS / name).read_text()


def python_of(name: str) -> list[str]:
    return [block.source for block in pages.blocks(name) if block.language == "python"]
