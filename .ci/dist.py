"""Build every distribution of the project, and try what was built as a user would meet it.

    dist.py build                        into dist/, checked by twine and by what a page of an index shows
    dist.py try PYTHON [--torch VERSION] [--cpu-index URL]
                                         in an empty environment of that Python

`make dist` does both.
"""

from __future__ import annotations

import argparse
import email
import email.message
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
PROJECTS = (".", *(f"plugins/{path.name}" for path in sorted((ROOT / "plugins").iterdir())))

SMOKE = """
import torch, attnplug
query, key, value = torch.randn(3, 2, 8, 64, 32).unbind()
out, lse = attnplug.scaled_dot_product_attention(query, key, value, softcap=30.0, window_size=(16, 0), return_lse=True)
starts = torch.tensor([0, 5, 8, 16], dtype=torch.int32)
packed = torch.randn(16, 8, 32)
attnplug.varlen_attn(packed, packed, packed, starts, starts, max_q=8, max_k=8, is_causal=True)
with attnplug.patch_torch(), attnplug.record() as calls, attnplug.sdpa_kernel("aten_math"):
    torch.nn.functional.scaled_dot_product_attention(query, key, value)
assert [call.impl for call in calls] == ["aten_math"], calls
attnplug.activate_flash_attention_impl("aten_flash")
attnplug.restore_flash_attention_impl()
compiled = torch.compile(attnplug.scaled_dot_product_attention, fullgraph=True, backend="eager")
torch.testing.assert_close(compiled(query, key, value, impl="math_ref"), compiled(query, key, value), atol=1e-5, rtol=0)
print(attnplug.explain(query, key, value, softcap=30.0))
"""
COMMANDS = (
    "attnplug -V",
    "attnplug list",
    "attnplug doctor",
    "attnplug explain --query 1,8,128,64 --softcap 30",
    "attnplug check math_ref aten_math --dtype float32 --only check_values --only check_causal --failed",
)


def build() -> None:
    """Build a source distribution of each project, and a wheel from that."""
    shutil.rmtree(DIST, ignore_errors=True)
    for project in PROJECTS:
        run(sys.executable, "-m", "build", "--quiet", "--outdir", DIST, ROOT / project)
    run(sys.executable, "-m", "twine", "check", "--strict", *sorted(DIST.iterdir()))
    wheels, sources = sorted(DIST.glob("*.whl")), sorted(DIST.glob("*.tar.gz"))
    assert len(wheels) == len(sources) == len(PROJECTS), sorted(DIST.iterdir())
    faults = [f"{path.name}: {fault}" for path in wheels for fault in faults_of_wheel(path)]
    faults += [f"{path.name}: {fault}" for path in sources for fault in faults_of_source(path)]
    if faults:
        sys.exit("\n".join(faults))
    print(f"{len(wheels)} wheels and as many source distributions are in {DIST}")


def faults_of_wheel(path: Path) -> Iterator[str]:
    """Yield what is wrong with a wheel."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        fields = email.message_from_string(archive.read(metadata).decode())
    module = fields["Name"].replace("-", "_")
    inside = {name.partition("/")[0] for name in names}
    if inside != {module, metadata.partition("/")[0]}:
        yield f"holds {sorted(inside)}, and should hold {module} alone"
    packaged, written = {name for name in names if name.startswith(f"{module}/")}, files_of(module)
    yield from (f"has no {name}" for name in sorted(written - packaged))
    yield from (f"holds {name}, which is not in the repository" for name in sorted(packaged - written))
    if f"{module}/py.typed" not in names:
        yield "has no py.typed"
    if not any(name.endswith(".dist-info/licenses/LICENSE") for name in names):
        yield "has no LICENSE"
    yield from faults_of_metadata(fields)


def files_of(module: str) -> set[str]:
    """Return what the repository has of a package: code, and the data that `package-data` must name."""
    (folder,) = (found for project in ("core", *PROJECTS) if (found := ROOT / project / module).is_dir())
    files = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder.parent).as_posix() for path in files}


def faults_of_metadata(fields: email.message.Message) -> Iterator[str]:
    """Yield what is wrong with what an index would show."""
    classifiers = fields.get_all("Classifier", [])
    for wanted in ("Programming Language :: Python :: 3.10", "Operating System :: ", "Typing :: Typed"):
        if not any(classifier.startswith(wanted) for classifier in classifiers):
            yield f"has no classifier {wanted!r}"
    text = fields.get_payload()
    assert isinstance(text, str)
    if len(text) < 200:
        yield "has hardly a description"
    for target in re.findall(r"\]\(([^)\s]+)\)|<img[^>]+src=\"([^\"]+)\"", text):
        link = "".join(target)
        if not link.startswith(("https://", "#")):
            yield f"its description links {link!r}, which leads nowhere outside the repository"
    for requirement in fields.get_all("Requires-Dist", []):
        if re.match(r"attnplug[\w-]*\s*(;|$)", requirement):
            yield f"requires {requirement!r}, of any version"


def faults_of_source(path: Path) -> Iterator[str]:
    """Yield what is missing from a source distribution."""
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"LICENSE", "pyproject.toml", "PKG-INFO"}
    if path.name.startswith("attnplug-"):
        wanted |= {"docs/index.md", "README.md", "CHANGELOG.md", "SECURITY.md"}
    yield from (f"has no {name}" for name in sorted(wanted - names))


def try_in_empty_environment(python: str, torch: str, cpu_index: str) -> None:
    """Install `attnplug[math]` from dist/ into an empty environment, and use it."""
    with tempfile.TemporaryDirectory() as folder:
        run(python, "-m", "venv", folder)
        programs = Path(folder, "bin")
        inside = programs / "python"
        pinned = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
        assert pinned is not None
        wanted = "torch" if torch == "newest" else f"torch=={torch or pinned[1]}"
        run(inside, "-m", "pip", "install", "--quiet", wanted, *(("--index-url", cpu_index) if cpu_index else ()))
        run(inside, "-m", "pip", "install", "--quiet", "--find-links", DIST, "attnplug[math]")
        run(inside, "-m", "pip", "check")
        try_installed(inside)
        run(inside, "-m", "pip", "install", "--quiet", "--no-deps", *sorted(DIST.glob("*.whl")))
        run(programs / "attnplug", "list")


def try_installed(python: Path) -> None:
    """Use what is installed beside `python`, in a folder from which nothing of the repository can be imported."""
    with tempfile.TemporaryDirectory() as folder:
        for command in COMMANDS:
            program, *arguments = command.split()
            run(python.parent / program, *arguments, cwd=folder)
        run(python, "-W", "error::UserWarning:attnplug", "-c", SMOKE, cwd=folder)


def run(*command: str | Path, cwd: str | Path = ROOT) -> None:
    """Run a command, and end with its status if that is not 0."""
    words = [str(word) for word in command]
    print(f"+ {' '.join(words)[:160].splitlines()[0]}", flush=True)
    done = subprocess.run(words, cwd=cwd, check=False)
    if done.returncode:
        sys.exit(done.returncode)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("build")
    trying = actions.add_parser("try")
    trying.add_argument("python")
    trying.add_argument("--torch", default="", help="a version, or newest; by default that of constraints.txt")
    trying.add_argument("--cpu-index", default="", help="the index that has PyTorch's builds for the CPU")
    trying.add_argument("--installed", action="store_true", help="use what is installed in PYTHON's environment")
    arguments = parser.parse_args()
    if arguments.action == "build":
        build()
    elif arguments.installed:
        try_installed(Path(arguments.python))
    else:
        try_in_empty_environment(arguments.python, arguments.torch, arguments.cpu_index)


if __name__ == "__main__":
    main()
