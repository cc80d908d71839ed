"""`ATTNPLUG_CHOICES` puts a file of measured choices to use; a program may put others to use meanwhile."""

from __future__ import annotations

import os
import sys

import forked
from attnplug.bench import Case
from measured import fastest

CASE = Case(heads=2, queries=1, keys=16, head_size=8)
CALL = """
import torch, attnplug
query, key = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 16, 8)
with attnplug.record() as calls:
    attnplug.scaled_dot_product_attention(query, key, key)
print(calls[0].impl)
"""


def in_environment(tmp_path, program=CALL, **variables):
    return forked.run(program, os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")} | variables)


def test_the_environment_puts_a_file_to_use_and_auto_this_users(tmp_path):
    choices = fastest((CASE, "aten_math"))
    file = choices.save(tmp_path / "mine.json")
    assert in_environment(tmp_path, ATTNPLUG_CHOICES=str(file)).stdout == "aten_math\n"
    missing = in_environment(tmp_path, ATTNPLUG_CHOICES="auto")
    assert missing.stdout == "torch\n"
    place = tmp_path / "cache" / "attnplug" / "choices.json"
    assert f"there are none yet in {place}; attnplug tune measures this machine" in missing.stderr
    choices.save(place)
    assert in_environment(tmp_path, ATTNPLUG_CHOICES="auto").stdout == "aten_math\n"
    assert in_environment(tmp_path, ATTNPLUG_CHOICES=str(file), ATTNPLUG_IMPL="aten_flash").stdout == "aten_flash\n"


def test_a_file_in_the_environment_that_holds_no_choices_is_an_error_that_names_the_variable(tmp_path):
    done = in_environment(tmp_path, ATTNPLUG_CHOICES=str(tmp_path / "none.json"))
    assert done.returncode == 1
    assert (
        "ConfigError: ATTNPLUG_CHOICES: " in done.stderr and "there is no such file; `attnplug tune -o" in done.stderr
    )


def test_what_a_program_puts_to_use_is_undone_to_what_the_environment_says(tmp_path):
    file = fastest((CASE, "aten_math")).save(tmp_path / "mine.json")
    other = fastest((CASE, "aten_flash")).save(tmp_path / "other.json")
    program = f"import attnplug; attnplug.use_choices({str(other)!r})\n{CALL}\nattnplug.restore_choices()\n{CALL}"
    assert in_environment(tmp_path, program, ATTNPLUG_CHOICES=str(file)).stdout == "aten_flash\naten_math\n"


def test_a_program_says_auto_as_the_environment_does(tmp_path):
    program = f"import attnplug; attnplug.use_choices('auto')\n{CALL}"
    missing = in_environment(tmp_path, program)
    assert missing.stdout == "torch\n" and "there are none yet in" in missing.stderr
    fastest((CASE, "aten_math")).save(tmp_path / "cache" / "attnplug" / "choices.json")
    assert in_environment(tmp_path, program).stdout == "aten_math\n"


def test_a_cudnn_that_pytorch_complains_of_is_in_the_way_of_no_choice(tmp_path):
    program = f"""
import attnplug, foreign_cudnn, pytest
from attnplug.bench import Case
from measured import fastest
foreign_cudnn.install(pytest.MonkeyPatch())
attnplug.use_choices(fastest(({CASE!r}, "aten_math")))
{CALL}"""
    done = in_environment(tmp_path, program, PYTHONPATH=os.pathsep.join(sys.path))
    assert done.stdout == "aten_math\n", done.stderr
