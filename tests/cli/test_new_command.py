"""`attnplug new` writes a package that works at once, or nothing.

What it writes is installed in an empty virtual environment and used there, as its author would. Where that is
beside the point, its metadata, made by its own build backend, lies beside its modules on the path of a fresh
interpreter.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch

import attnplug
from packages import Site

FLAVOURS = ("torch", "triton", "cuda")
METADATA = "import sys, setuptools.build_meta as backend; backend.prepare_metadata_for_build_wheel(sys.argv[1])"

RUN = """
import contextlib, io, json
from attnplug.cli import main

def run(*arguments):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        status = main([*arguments, "--json"])
    return status, printed.getvalue()

"""

WHY_NOT = RUN + (
    "calls = [('--query', '1,2,8,16', '--device', device) for device in DEVICES]\n"
    "print(json.dumps([json.loads(run('explain', *call)[1]) for call in calls]))"
)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def needs(distribution: str, version: int) -> None:
    """Skip a test without this version, or newer, of a build tool; importing one would change this process."""
    try:
        found = int(importlib.metadata.version(distribution).partition(".")[0])
    except importlib.metadata.PackageNotFoundError:
        found = 0
    if found < version:
        pytest.skip(f"the generated package is built with {distribution}>={version}")


def installed(folder: Path) -> Site:
    """Make the package's metadata, with the backend that it names, where an interpreter finds it."""
    needs("setuptools", 77)
    made = subprocess.run([sys.executable, "-c", METADATA, folder], cwd=folder, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return Site(folder)


@pytest.fixture
def write(cli, tmp_path):
    def new(*arguments: str) -> Path:
        done = cli("new", *arguments, "--directory", str(tmp_path))
        assert (done.status, done.err) == (0, "")
        return tmp_path / arguments[0]

    return new


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Make an empty virtual environment, and return how to run it; torch, attnplug and pytest are lent to it.

    What is lent is everything that an environment of its own would have to download; the package itself is
    installed for good, by pip, and is found by its own entry point.
    """
    needs("pip", 23)
    needs("setuptools", 77)
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    programs = folder / ("Scripts" if os.name == "nt" else "bin")
    python = str(programs / "python")
    packages = subprocess.check_output([python, "-c", "import site; print(site.getsitepackages()[0])"], text=True)
    lent = [path for path in (*site.getsitepackages(), *sys.path) if Path(path).name.endswith("-packages")]
    lines = [f"import site; site.addsitedir({path!r})" for path in dict.fromkeys(lent)]
    Path(packages.strip(), "lent.pth").write_text("\n".join(lines))
    for name, module in PROGRAMS.items():  # not `python -m`, which puts the current folder on the path
        (programs / f"{name}.py").write_text(f"import sys\nfrom {module} import main\nsys.exit(main())\n")
    (programs / "quick_pytest.py").write_text(QUICK)

    def run(program: str, *arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
        command = [python, str(programs / f"{program}.py"), *arguments]
        return subprocess.run(command, cwd=cwd, env=kept | variables, capture_output=True, text=True, check=False)

    return run


QUICK = f"""
import sys
sys.path.append({str(Path(__file__).parents[1] / "support")!r})
from contextlib import ExitStack
import pytest

class Quick:
    def pytest_collection_finish(self):  # by now the tests have told Triton to interpret
        from interpreter import quickened
        until_the_end.enter_context(quickened(package))

package = sys.argv.pop()
with ExitStack() as until_the_end:
    sys.exit(pytest.main(sys.argv[1:], plugins=[Quick()]))
"""
PROGRAMS = {"lent_pip": "pip._internal.cli.main", "lent_attnplug": "attnplug.cli", "lent_pytest": "pytest"}


@pytest.mark.slow(first=True)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_new_package_installs_is_listed_and_passes_its_own_tests(write, environment, flavour):
    """They are the whole conformance kit, on the implementation that the package's entry point announces."""
    if flavour == "triton":
        pytest.importorskip("triton")
    if flavour == "cuda" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("needs a C++ compiler")
    name = f"my_{flavour}_kernel"
    folder = write(name, f"--{flavour}")
    cache = {"XDG_CACHE_HOME": str(folder.parent / "cache")}
    interpreted = {"TRITON_INTERPRET": "1"} if flavour == "triton" and not torch.cuda.is_available() else {}

    installed = environment(
        "lent_pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "-e", ".", cwd=folder
    )
    assert installed.returncode == 0, installed.stderr

    listed = environment("lent_attnplug", "list", "--json", cwd=folder.parent, **interpreted)
    (record,) = (record for record in json.loads(listed.stdout)["implementations"] if record["name"] == name)
    assert (record["distribution"], record["version"]) == (name.replace("_", "-"), "0.1.0")
    assert record["status"] == "available"

    how = ("quick_pytest", "-q", name) if interpreted else ("lent_pytest", "-q")
    tested = environment(*how, cwd=folder, **cache)
    assert tested.returncode == 0, tested.stdout
    assert " passed" in tested.stdout


def why_not(site: Site, *devices: str, **environment: str) -> list[str]:
    """Return, for a call on each device, why the package's kernel does not take it."""
    done = site.python(WHY_NOT.replace("DEVICES", repr(devices)), **environment)
    assert done.returncode == 0, done.stderr
    return [
        "; ".join(verdict["reasons"])
        for explanation in json.loads(done.stdout)
        for verdict in explanation["candidates"]
        if verdict["name"] == "my_kernel"
    ]


def test_triton_on_the_cpu_without_its_interpreter_is_declined_with_the_reason(write):
    pytest.importorskip("triton")
    site = installed(write("my_kernel", "--triton"))
    (reason,) = why_not(site, "cpu", TRITON_INTERPRET="")
    assert "TRITON_INTERPRET=1" in reason


def test_cuda_without_a_compiler_is_declined_with_the_reason(write):
    folder = write("my_kernel", "--cuda")
    site, bare = installed(folder), {"PATH": str(folder / "nothing"), "CXX": "", "CUDA_HOME": str(folder)}
    on_cpu, on_gpu = why_not(site, "cpu", "cuda", **bare)
    assert "needs a C++ compiler" in on_cpu and "needs nvcc" in on_gpu


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_all_that_publishing_takes_is_written(write, flavour):
    folder = write("my_kernel", f"--{flavour}")
    assert files(folder) >= {
        *("pyproject.toml", "README.md", "LICENSE", ".gitignore", ".github/workflows/test.yml"),
        *("my_kernel/__init__.py", "my_kernel/impl.py", "my_kernel/py.typed", "tests/test_conformance.py"),
    }
    named = re.findall(r"^\| `(\S+)`", (folder / "README.md").read_text(), re.MULTILINE)
    assert named and files(folder).issuperset(named)
    assert re.search(r"Copyright \(c\) 20\d\d, the my_kernel authors", (folder / "LICENSE").read_text())


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_new_kernel_stands_behind_all_others_for_a_range_of_versions_with_types(write, flavour):
    site = installed(write("my_kernel", f"--{flavour}"))
    done = site.python(RUN + "print(run('show', 'my_kernel')[1])")
    (shown,) = json.loads(done.stdout)["implementations"]
    assert shown["priority"] < min(r.priority for r in attnplug.list_impls() if r.name != "my_kernel")
    major, minor = attnplug.__version__.split(".")[:2]
    assert set(next(r for r in shown["requires"] if r.startswith("attnplug"))[8:].split(",")) == {
        f">={major}.{minor}",
        f"<{major}.{int(minor) + 1}",
    }
    text = (site.folder / "pyproject.toml").read_text()
    assert re.search(r'package-data = \{ my_kernel = \["py\.typed"', text)


def test_the_workflow_installs_the_build_for_the_cpu(write):
    lines = (write("my_kernel") / ".github/workflows/test.yml").read_text().splitlines()
    (command,) = (line for line in lines if "pip install torch" in line)
    assert command.endswith("--index-url https://download.pytorch.org/whl/cpu")


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_only_the_given_name_is_in_it(write, flavour):
    folder = write("Swift_2", f"--{flavour}")
    for path in files(folder):
        text = path + (folder / path).read_text()
        assert "my_kernel" not in text and "my-kernel" not in text and "-tpl" not in text, path
    assert 'name = "Swift-2"' in (folder / "pyproject.toml").read_text()


def test_torch_is_what_is_written_if_nothing_is_said(write):
    assert "composite = True" in (write("my_kernel") / "my_kernel/impl.py").read_text()


def test_json_names_what_was_written(cli, tmp_path):
    written = cli("new", "my_kernel", "--triton", "--directory", str(tmp_path), "--json").data
    assert (written["name"], written["flavour"]) == ("my_kernel", "triton")
    assert set(written["files"]) == files(Path(written["folder"])) == files(tmp_path / "my_kernel")


def refused(cli, folder: Path, *arguments: str) -> str:
    """Return the error of a command that may write nothing."""
    before = files(folder)
    done = cli("new", *arguments)
    assert (done.status, done.out) == (2, "")
    assert files(folder) == before
    return done.err.splitlines()[-1]


@pytest.mark.parametrize(
    "name", ["my-kernel", "2fast", "class", "", "kernel_", "_kernel", "noyau_é", "a.b", "a/b", ".."]
)
def test_what_cannot_name_a_module_is_refused(cli, tmp_path, name):
    error = refused(cli, tmp_path, name, "--directory", str(tmp_path))
    assert repr(name) in error and "cannot name a module" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "holder"), [("aten_math", "attnplug"), ("mine", "this program")])
def test_the_name_of_an_implementation_is_refused(cli, tmp_path, register, name, holder):
    register(name="mine")
    error = refused(cli, tmp_path, name, "--directory", str(tmp_path))
    assert f"{name!r} is taken: {holder} has an implementation" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["math", "cudnn_attention"])  # the first is a module's, too
def test_the_name_of_a_family_is_refused(cli, tmp_path, name):
    assert f"{name!r} is the name of a family" in refused(cli, tmp_path, name, "--directory", str(tmp_path))


@pytest.mark.parametrize("name", ["json", "sys", "pluggy", "attnplug"])
def test_the_name_of_a_module_is_refused(cli, tmp_path, name):
    assert f"{name!r} is taken" in refused(cli, tmp_path, name, "--directory", str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_exists_is_left_alone(cli, tmp_path):
    (tmp_path / "my_kernel").mkdir()
    (tmp_path / "my_kernel/notes").write_text("mine")
    error = refused(cli, tmp_path, "my_kernel", "--directory", str(tmp_path))
    assert "exists" in error
    assert files(tmp_path) == {"my_kernel/notes"}


def test_a_directory_that_does_not_exist_is_refused(cli, tmp_path):
    error = refused(cli, tmp_path, "my_kernel", "--directory", str(tmp_path / "nowhere"))
    assert "nowhere" in error and "--directory" in error
    assert list(tmp_path.iterdir()) == []


def test_one_kernel_is_written_in_one_language(cli, tmp_path):
    assert "not allowed with" in refused(cli, tmp_path, "my_kernel", "--cuda", "--triton", "--directory", str(tmp_path))


def test_nothing_is_left_of_a_package_that_could_not_be_written_whole(cli, tmp_path, monkeypatch):
    written = []

    def full(path: Path, *text: str, **options: str) -> None:
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        written.append(path.write_bytes(b""))

    monkeypatch.setattr(Path, "write_text", full)
    assert "No space left on device" in refused(cli, tmp_path, "my_kernel", "--directory", str(tmp_path))
    assert len(written) == 3 and list(tmp_path.iterdir()) == []
