"""Show one implementation, or all of one plugin: what it supports, where it comes from, and where it is described.

NAME is that of an implementation or of an entry point. Neither torch nor the kernel is imported. Exit status 2: there
is none; where it is known and not installed, the error says what brings it.

examples:
  attnplug show math_ref
  attnplug show my_kernel --readme
"""

from __future__ import annotations

import argparse
import re
import sys
from typing import TYPE_CHECKING, Any

import attnplug
from attnplug import ImplRecord
from attnplug._control.registration import check_name
from attnplug._registry.machine import installed_version
from attnplug.cli import describe, render
from attnplug.cli.parser import complete_with

if TYPE_CHECKING:
    from email.message import Message

HELP = "show everything that is known about an implementation"


def configure(parser: argparse.ArgumentParser) -> None:
    name = parser.add_argument("name", metavar="NAME", help="of an implementation, or of an entry point")
    complete_with(name, lambda: [record.name for record in attnplug.list_impls()])
    parser.add_argument("--readme", action="store_true", help="print the description of its distribution")


def run(arguments: argparse.Namespace) -> int:
    records = [record for record in attnplug.list_impls() if arguments.name == record.name]
    records = records or [record for record in attnplug.list_impls() if arguments.name == record.entry_point]
    if not records:
        check_name(arguments.name)
    found = [_Package(record) for record in records]
    if arguments.readme:
        return _readme(found[0])
    if arguments.json:
        data = [describe.as_json(record) | package.as_json() for record, package in zip(records, found, strict=True)]
        render.print_json({"implementations": data})
    else:
        shown = [
            describe.block(record.name, [*describe.facts(record), *package.fields(), *describe.supported(record)])
            for record, package in zip(records, found, strict=True)
        ]
        render.put("\n\n".join(shown))
    return 0


def _readme(package: _Package) -> int:
    text = package.description()
    if not text:
        print(f"attnplug: {package.record.distribution} has no description", file=sys.stderr)
        return 1
    render.put(text)
    return 0


class _Package:
    """What the metadata of an implementation's distribution says."""

    def __init__(self, record: ImplRecord) -> None:
        from email.message import Message
        from importlib.metadata import PackageNotFoundError, metadata  # 90 ms, of which `attnplug list` has few

        self.record = record
        try:
            found: Any = metadata(record.distribution)
        except PackageNotFoundError:  # what a program registers
            found = Message()
        self._metadata: Message = found

    def fields(self) -> describe.Fields:
        described = self.as_json()
        fields = [
            ("summary", described["summary"]),
            ("versions", ", ".join(f"{name} {version or 'missing'}" for name, version in self.versions().items())),
            *(("documentation", page) for page in described["documentation"]),
        ]
        return [field for field in fields if field[1]]

    def as_json(self) -> dict[str, Any]:
        return {
            "summary": self._metadata.get("Summary", ""),
            "requires": self._required(),
            "versions": self.versions(),
            "documentation": self._documentation(),
        }

    def versions(self) -> dict[str, str | None]:
        """Return the versions of what it requires, None of what is missing."""
        names = [re.split(r"[^\w.-]", requirement, maxsplit=1)[0] for requirement in self._required()]
        return {name: installed_version(name) for name in dict.fromkeys(names)}

    def description(self) -> str:
        return str(self._metadata.get_payload() or self._metadata.get("Description", "")).strip()

    def _required(self) -> list[str]:
        """Return what it requires in any case, as its metadata writes it."""
        return [text for text in self._metadata.get_all("Requires-Dist", []) if "extra ==" not in text]

    def _documentation(self) -> list[str]:
        urls = [url.partition(", ")[2] for url in self._metadata.get_all("Project-URL", [])]
        readme = f"attnplug show {self.record.name} --readme" if self.description() else ""
        return [*urls, *filter(None, [readme])]
