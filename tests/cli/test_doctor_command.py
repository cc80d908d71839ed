"""`attnplug doctor` names what cannot run here, why, and the command that mends it."""

from __future__ import annotations

import json
import shlex

import pytest

import attnplug
from packages import Site, plugin, spec


def finding(data: dict, name: str) -> dict:
    return next(each for each in data["findings"] if each["name"] == name)


def test_a_missing_library_comes_with_the_command_that_brings_it(cli, register):
    register(name="rocket", requires=("absent_module",), install="pip install rocket-fuel")
    data = cli("doctor", "--json").data
    assert finding(data, "rocket") == {
        "name": "rocket",
        "status": "unavailable",
        "reason": "needs absent_module, not installed",
        "remedy": "pip install rocket-fuel",
    }
    text = cli("doctor").out
    assert "  rocket: needs absent_module, not installed\n      pip install rocket-fuel\n" in text


def test_a_kernel_that_cannot_run_here_is_not_imported(cli, register, tmp_path, monkeypatch):
    (tmp_path / "needs_rocket.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    register(name="rocket", kernel="needs_rocket.kernel", requires=("absent_module",))
    assert finding(cli("doctor", "--json").data, "rocket")["status"] == "unavailable"
    assert cli("doctor").status == 0


def test_every_implementation_is_either_available_or_found(cli):
    data = cli("doctor", "--json").data
    names = {record.name for record in attnplug.list_impls()}
    assert names <= {*data["available"], *(each["name"] for each in data["findings"])}


def test_what_is_absent_is_no_fault(cli, register):
    register(name="rocket", requires=("absent_module",))
    done = cli("doctor")
    assert done.status == 0 and done.out.startswith("Nothing is broken. ")


@pytest.mark.filterwarnings("default")
def test_a_kernel_that_cannot_be_imported_is_found_before_a_call_needs_it(cli, register):
    register(name="wreck", kernel="absent_module.kernel")
    done = cli("doctor", "--json")
    assert (done.status, done.err, done.data["healthy"]) == (1, "", False)
    found = finding(done.data, "wreck")
    assert found["status"] == "broken" and "ModuleNotFoundError" in found["reason"]


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path)


def diagnosed(site: Site, **environment: str) -> tuple[int, dict]:
    script = "import sys; from attnplug.cli import main; sys.exit(main(['doctor', '--json']))"
    done = site.python(script, **environment)
    return done.returncode, json.loads(done.stdout)


def test_a_broken_plugin_is_to_be_installed_again(site):
    site.install("fake-broken", {"broken": "raise OSError('no such library')\n"})
    status, data = diagnosed(site)
    found = finding(data, "broken")
    assert status == 1 and "no such library" in found["reason"]
    assert found["remedy"] == "pip install --upgrade --force-reinstall fake-broken"


@pytest.mark.parametrize(
    ("origin", "remedy"),
    [
        ({"url": "file:///home/me/broken", "dir_info": {"editable": True}}, ""),
        (
            {"url": "https://example.com/broken.git", "vcs_info": {"vcs": "git", "commit_id": "0"}},
            "pip install --upgrade --force-reinstall 'fake-broken @ git+https://example.com/broken.git'",
        ),
        (
            {
                "url": "https://example.com/many.git",
                "vcs_info": {"vcs": "git", "requested_revision": "next", "commit_id": "0"},
                "subdirectory": "plugins/broken",
            },
            "pip install --upgrade --force-reinstall "
            "'fake-broken @ git+https://example.com/many.git@next#subdirectory=plugins/broken'",
        ),
        (
            {"url": "file:///tmp/broken.whl", "archive_info": {}},
            "pip install --upgrade --force-reinstall 'fake-broken @ file:///tmp/broken.whl'",
        ),
    ],
)
@pytest.mark.parametrize("at", ["plugin", "kernel"])
def test_a_broken_plugin_that_came_from_elsewhere_is_not_looked_for_in_the_index(site, origin, remedy, at):
    light = "raise OSError('no such library')\n" if at == "plugin" else plugin(spec("broken", "absent_module"))
    site.install("fake-broken", {"broken": light})
    (site.folder / "fake_broken-1.0.dist-info" / "direct_url.json").write_text(json.dumps(origin))
    status, data = diagnosed(site)
    assert (status, finding(data, "broken")["remedy"]) == (1, remedy)


@pytest.mark.parametrize(
    "group",
    ["attnplugs", "attn-plug", "attnplug.impl", "attnplug.plugins", "attnplug_impls", "attnplug_register_impls"],
)
def test_a_plugin_in_a_misspelt_group_is_found(site, group):
    site.install_healthy("mine")
    (site.folder / "fake_mine-1.0.dist-info" / "entry_points.txt").write_text(f"[{group}]\nmine = mine\n")
    status, data = diagnosed(site)
    found = finding(data, "mine")
    assert (status, found["status"], found["remedy"]) == (1, "broken", "")
    assert found["reason"] == (
        f"is not loaded: fake-mine 1.0 has it among the entry points of group {group!r}; the group is called 'attnplug'"
    )


@pytest.mark.parametrize(
    "group", ["console_scripts", "napari.plugin", "attention", "attnplug_studio.plugins", "attnplug.mine"]
)
def test_groups_of_others_are_not_taken_for_misspelt(site, group):
    site.install_healthy("mine")
    (site.folder / "fake_mine-1.0.dist-info" / "entry_points.txt").write_text(f"[{group}]\nmine = mine\n")
    assert "mine" not in {each["name"] for each in diagnosed(site)[1]["findings"]}


def test_a_plugin_may_have_groups_of_its_own(site):
    site.install_healthy("mine")
    entry_points = "[attnplug]\nmine = mine\n[attnplug.mine]\nmore = mine\n"
    (site.folder / "fake_mine-1.0.dist-info" / "entry_points.txt").write_text(entry_points)
    status, data = diagnosed(site)
    assert status == 0 and "mine" in data["available"]


def test_two_that_claim_one_name_are_told_how_to_leave_one_out(site):
    site.install_healthy("healthy")
    source = (site.folder / "healthy.py").read_text()
    site.install("fake-other", {"other": source})
    status, data = diagnosed(site)
    remedies = [each["remedy"] for each in data["findings"] if each["name"] == "healthy"]
    assert status == 1
    assert [command.endswith((",healthy", ",other")) or "healthy" in command for command in remedies] == [True, True]
    assert all(command.startswith("export ATTNPLUG_DISABLE=") for command in remedies)
    text = site.python("import sys; from attnplug.cli import main; sys.exit(main(['doctor']))")
    assert text.stdout.count("healthy: Duplicate") == text.stdout.count("# one of these\n") == 1
    assert all(f"      {command}\n" in text.stdout for command in remedies) and "could not be loaded" not in text.stderr


def test_what_the_environment_forbids_comes_with_the_setting_that_allows_it(site):
    site.install_healthy("healthy")
    _, data = diagnosed(site, ATTNPLUG_DISABLE="healthy")
    assert finding(data, "healthy")["remedy"] == "unset ATTNPLUG_DISABLE"
    _, data = diagnosed(site, ATTNPLUG_LOAD="", ATTNPLUG_DISABLE="")
    assert finding(data, "healthy")["remedy"] == "export ATTNPLUG_LOAD=healthy"


def test_what_is_not_installed_can_be_installed(site):
    _, data = diagnosed(site, ATTNPLUG_DISABLE="math_ref")
    absent = {each["name"]: each["remedy"] for each in data["findings"] if each["status"] == "not installed"}
    assert set(absent.values()) <= {
        f"pip install 'attnplug[{extra}]'" for extra in ("math", "triton", "cuda", "adapters")
    }
    assert "math_ref" not in absent  # it is installed, and disabled


def test_a_torch_that_cannot_be_imported_is_the_finding(shell, tmp_path):
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.99: cannot open shared object file')\n")
    done = shell("doctor", options=(), PYTHONPATH=str(tmp_path))
    assert done.status == 1 and "Traceback" not in done.err
    assert "torch: cannot be imported: OSError: libcudart.so.99" in done.out
    assert "pip install --force-reinstall torch" in done.out


def test_a_variable_that_means_nothing_is_to_be_unset(shell):
    done = shell("doctor", ATTNPLUG_STRIC="1")
    assert done.status == 1
    assert "ATTNPLUG_STRIC: no such variable" in done.out and "unset ATTNPLUG_STRIC\n" in done.out


def test_a_variable_whose_name_nothing_can_run_is_the_finding(site):
    site.install_healthy("healthy")
    site.install("fake-other", {"other": (site.folder / "healthy.py").read_text()})
    for variable, value, said in (
        ("ATTNPLUG_IMPL", "nosuch", "unknown implementation 'nosuch'"),
        ("ATTNPLUG_IMPL", "healthy", "'healthy'"),  # two claim it
        ("ATTNPLUG_VERIFY", "0.5", "'math_ref' is disabled"),
    ):
        status, data = diagnosed(site, **{"ATTNPLUG_DISABLE": "math_ref", variable: value})
        (found,) = data["findings"]
        assert (status, found["name"], found["remedy"]) == (1, variable, f"unset {variable}")
        assert said in found["reason"]


def test_what_no_installation_mends_has_no_command(on_devices):
    on_devices("cpu")
    on_gpu_alone = [each for each in attnplug.list_impls() if each.capabilities.devices == {"cuda"}]
    assert len(on_gpu_alone) > 5
    for each in on_gpu_alone:
        assert (each.reason, each.remedy) == ("needs a cuda device, and this machine has none", "")


def test_what_is_missing_beside_a_gpu_has_a_command_that_a_shell_can_run(on_devices):
    on_devices("cpu", "cuda")
    lacking = [each for each in attnplug.list_impls() if each.reason.startswith("needs")]
    assert {"FA3", "FA4", "flash_attn3"} <= {each.name for each in lacking}
    for each in lacking:
        pip, install, *what = shlex.split(each.remedy)
        assert (pip, install) == ("pip", "install") and what and not any(";" in word or "," in word for word in what)
