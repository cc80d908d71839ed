"""Files of measured choices: nothing is lost, and what is wrong with one is said with the way out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import attnplug
from attnplug import Choices, ChoicesError
from attnplug.bench import Case
from attnplug.cli import main
from measured import fastest

CASE = Case(heads=2, queries=8, head_size=8)


def test_saved_choices_are_read_back(tmp_path):
    choices = fastest((CASE, "aten_math"), (CASE.but(causal=True, queries=64, dtype="bfloat16"), "aten_flash"))
    path = choices.save(tmp_path / "new" / "choices.json")
    assert Choices.load(path) == choices and str(Choices.load(path)) == str(choices)
    assert json.loads(path.read_text())["format"] == 1
    assert path.stat().st_mode & 0o444 == 0o444  # for others to read
    assert len(choices) == len(list(choices)) == 2


def test_notes_are_read_back_and_are_those_of_what_was_saved_last(tmp_path, capsys):
    path = tmp_path / "choices.json"
    first, second = (
        replace(fastest((CASE.but(queries=queries), "aten_math")), notes=(note,))
        for queries, note in ((8, "Interrupted: not measured is one."), (64, "WRONG, so not chosen: aten_flash."))
    )
    first.save(path)
    assert str(Choices.load(path)) == str(first) and first.notes[0] in str(first)
    second.save(path)
    assert Choices.load(path) == first | second
    assert Choices.load(path).notes == second.notes
    main(["list", "--choices", str(path)])
    assert second.notes[0] in capsys.readouterr().out
    main(["list", "--choices", str(path), "--json"])
    assert json.loads(capsys.readouterr().out)["notes"] == list(second.notes)


@pytest.mark.parametrize("notes", ["text", [1], {"a": "b"}, None])
def test_notes_that_are_no_sentences_are_damage(tmp_path, notes):
    path = fastest((CASE, "aten_math")).save(tmp_path / "choices.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "notes": notes}))
    with pytest.raises(ChoicesError, match="is damaged"):
        Choices.load(path)


def test_saving_adds_to_what_is_there_and_what_was_measured_last_counts(tmp_path):
    path = tmp_path / "choices.json"
    fastest((CASE, "aten_math"), (CASE.but(queries=64), "aten_math")).save(path)
    fastest((CASE, "aten_flash"), (CASE.but(queries=256), "aten_flash")).save(path)
    found = {choice.kind.queries: choice.impl for choice in Choices.load(path)}
    assert found == {8: "aten_flash", 64: "aten_math", 256: "aten_flash"}


def test_of_one_kind_what_was_measured_last_counts_in_whichever_order_they_come():
    older, newer = (
        Choices(
            tuple(replace(table, choices=tuple(replace(one, created=day) for one in table.choices)) for table in each)
        )
        for day, each in (
            ("2026-01-01", fastest((CASE, "aten_math")).tables),
            ("2026-01-02", fastest((CASE, "aten_flash")).tables),
        )
    )
    for both in (older | newer, newer | older):
        assert [choice.impl for choice in both] == ["aten_flash"]


def test_tables_of_other_machines_stay_beside_each_other(tmp_path):
    path, other = tmp_path / "choices.json", tmp_path / "other.json"
    fastest((CASE, "aten_math")).save(other)
    other.write_text(other.read_text().replace('"capability": "', '"capability": "other '))
    fastest((CASE, "aten_flash")).save(path)
    merged = Choices.load(path) | Choices.load(other)
    assert [choice.impl for choice in merged] == ["aten_flash", "aten_math"] and len(merged.tables) == 2
    merged.save(path)
    assert Choices.load(path) == merged


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        pytest.param("[" * 100_000, "is not JSON", id="too deep"),
        ("[]", "holds no measured choices; `attnplug tune` and"),
        ('{"cases": []}', "holds no measured choices"),
        ('{"format": 2, "tables": []}', "has format 2, and this attnplug reads format 1; measure again into"),
        ('{"format": 1, "tables": [{}]}', "is damaged"),
        ('{"format": 1, "tables": 3}', "is damaged"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_an_error_and_is_not_overwritten(tmp_path, content, message):
    path = tmp_path / "choices.json"
    path.write_text(content)
    for use in (Choices.load, fastest((CASE, "aten_math")).save, attnplug.use_choices):
        with pytest.raises(ChoicesError) as raised:
            use(path)
        assert message in str(raised.value) and str(raised.value).startswith(f"{path}: ")
    assert path.read_text() == content


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("head_size", 0), ("keys", "many"), ("group", True), ("dtype", None), ("gradients", []), ("seconds", -1.0),
        ("seconds", "fast"), ("seconds", 10**400), ("default_seconds", float("nan")), ("default_seconds", "inf"),
    ],
)  # fmt: skip
def test_a_value_that_means_nothing_is_damage(tmp_path, field, value):
    path = fastest((CASE, "aten_math")).save(tmp_path / "choices.json")
    given = json.loads(path.read_text())
    choice = given["tables"][0]["choices"][0]
    (choice if field in choice else choice["kind"])[field] = value
    path.write_text(json.dumps(given))
    with pytest.raises(ChoicesError, match="is damaged"):
        Choices.load(path)


def test_a_missing_file_is_an_error_that_says_what_writes_it(tmp_path):
    with pytest.raises(ChoicesError, match="there is no such file; `attnplug tune -o .*` measures this machine"):
        Choices.load(tmp_path / "none.json")


def test_a_place_that_cannot_be_written_is_an_error_that_says_where_else(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ChoicesError, match="cannot be written .* choose another place: attnplug tune -o FILE"):
        fastest((CASE, "aten_math")).save(tmp_path / "file" / "choices.json")


def test_a_full_disk_leaves_what_was_there_and_nothing_else(tmp_path, monkeypatch):
    path = fastest((CASE, "aten_math")).save(tmp_path / "choices.json")
    before = {each.name for each in tmp_path.iterdir()}

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(ChoicesError, match="cannot be written .*No space left on device"):
        fastest((CASE, "aten_flash")).save(path)
    assert {each.name for each in tmp_path.iterdir()} == before
    assert [choice.impl for choice in Choices.load(path)] == ["aten_math"]


def test_a_link_keeps_leading_to_the_file_and_a_device_or_folder_is_an_error(tmp_path):
    path = fastest((CASE, "aten_math")).save(tmp_path / "choices.json")
    (tmp_path / "link.json").symlink_to(path)
    fastest((CASE.but(head_size=16), "aten_flash")).save(tmp_path / "link.json")
    assert (tmp_path / "link.json").is_symlink() and len(Choices.load(path)) == 2
    for place in (tmp_path, Path(os.devnull)):
        with pytest.raises(ChoicesError, match="is not a file; choose another place"):
            fastest((CASE, "aten_math")).save(place)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="no folder is read-only for this user")
def test_a_folder_that_is_read_only_is_an_error_and_what_it_holds_is_still_read(tmp_path):
    path = fastest((CASE, "aten_math")).save(tmp_path / "choices.json")
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(ChoicesError, match="cannot be written"):
            fastest((CASE, "aten_flash")).save(path)
        assert [choice.impl for choice in Choices.load(path)] == ["aten_math"]
    finally:
        tmp_path.chmod(0o700)


def test_the_default_place_is_in_the_users_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("platformdirs.user_cache_path", lambda name, appauthor: tmp_path / name)
    assert fastest((CASE, "aten_math")).save() == tmp_path / "attnplug" / "choices.json"
    assert [choice.impl for choice in Choices.load()] == ["aten_math"]


SAVES = """
import sys
from dataclasses import replace
import attnplug
from attnplug import Choices

choices = Choices.load(sys.argv[1])
(table,) = choices.tables
(choice,) = table.choices
for number in range(10):
    kind = choice.kind._replace(head_size=8 * (int(sys.argv[3]) * 10 + number + 1))
    Choices((replace(table, choices=(replace(choice, kind=kind),)),)).save(sys.argv[2])
"""


def test_processes_that_save_to_one_file_at_once_lose_nothing(tmp_path):
    one = fastest((CASE, "aten_math")).save(tmp_path / "one.json")
    path = tmp_path / "all.json"
    ranks = [
        subprocess.Popen([sys.executable, "-c", SAVES, str(one), str(path), str(rank)], stderr=subprocess.PIPE)
        for rank in range(3)
    ]
    errors = [rank.communicate(timeout=600)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0, 0], errors
    assert sorted(choice.kind.head_size for choice in Choices.load(path)) == [8 * number for number in range(1, 31)]
    assert {each.name for each in Path(tmp_path).iterdir()} == {
        "one.json",
        "one.json.lock",
        "all.json",
        "all.json.lock",
    }


def test_choices_are_read_and_saved_without_torch(tmp_path):
    path = fastest((CASE, "aten_math")).save(tmp_path / "choices.json")
    program = f"import sys, attnplug; attnplug.Choices.load({str(path)!r}).save(); print('torch' in sys.modules)"
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
