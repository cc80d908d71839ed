"""Run a program on PyTorch's CUDA build where there is no GPU: every function of CUDA and cuDNN returns at once.

    python benchmarks/without_gpu.py benchmarks/launching.py

What the host does around CUDA is real: PyTorch's dispatch and allocator, cuDNN's frontend, Triton's launcher, all of
attnplug. Tensors lie in the host's memory, kernels are counted and not run: what is computed means nothing, and times
are those of the host, without those of CUDA itself. The device is described as a GPU of compute capability 9.0.

What is missing: cuBLAS, and the capture of streams. Needs Linux, a C compiler, `nm`, and PyTorch's CUDA build with all
that it requires.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

CC = os.environ.get("CC", "cc")
SOURCES = Path(__file__).parent / "no_gpu"
DEFINED = re.compile(r" [TDBR] (\w+)(?:@|$)", re.MULTILINE)


def package(name: str) -> Path:
    """Return the folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"{name} is not installed: this needs PyTorch's CUDA build, with all that it requires")
    return Path(next(iter(spec.submodule_search_locations)))


def library(name: str) -> Path:
    """Return one of the libraries that PyTorch's CUDA build requires."""
    found = sorted(package("nvidia").glob(f"**/lib/{name}.so.*"))
    if not found:
        sys.exit(f"{name} is not installed: this needs PyTorch's CUDA build")
    return found[0]


def compiled(*arguments: str | Path) -> None:
    subprocess.run([CC, "-O2", "-w", "-fPIC", "-fno-builtin", *arguments], check=True)


def defined_in(binary: Path, *options: str) -> set[str]:
    """Return the names of what a library or an object file defines."""
    listed = subprocess.run(["nm", *options, binary], check=True, capture_output=True, text=True).stdout
    return set(DEFINED.findall(listed))


def build(source: Path, soname: str, names: set[str], includes: list[Path], folder: Path, versioned: bool) -> Path:
    """Build a library of what `source` defines and, for all other `names`, of functions that return 0."""
    own, others, built = folder / f"{source.stem}.o", folder / f"{source.stem}_others.c", folder / soname
    compiled("-c", source, "-o", own, *(f"-I{include}" for include in includes))
    others.write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in sorted(names - defined_in(own))))
    exported = []
    if versioned:  # as the libraries that are linked against it ask for
        script = folder / f"{source.stem}.map"
        script.write_text(f"{soname} {{ global: *; }};\n")
        exported = [f"-Wl,--version-script={script}"]
    compiled("-shared", own, others, "-o", built, f"-Wl,-soname,{soname}", *exported, "-ldl")
    return built


def environment(folder: Path) -> dict[str, str]:
    """Build all libraries in a folder, and return what the environment of a program must say to find them."""
    headers = package("triton") / "backends" / "nvidia" / "include"
    runtime, cudnn = library("libcudart"), library("libcudnn")
    of_cuda = [runtime.parents[1] / "include", headers]  # Triton's, of another release, for what the wheel leaves out
    of_driver = set(re.findall(r"\bcu[A-Z]\w+", (headers / "cuda.h").read_text()))
    driver = build(SOURCES / "driver.c", "libcuda.so.1", of_driver, [], folder, versioned=False)
    (folder / "libcuda.so").symlink_to(driver)
    preloaded = []
    for real, source, includes in (
        (runtime, "runtime.c", of_cuda),
        (cudnn, "cudnn.c", [cudnn.parents[1] / "include", *of_cuda]),
    ):
        names = defined_in(real, "-D", "--defined-only")
        preloaded.append(build(SOURCES / source, real.name, names, includes, folder, versioned=True))
    return {
        "LD_PRELOAD": ":".join(map(str, preloaded)),
        "LD_LIBRARY_PATH": str(folder),
        "TRITON_LIBCUDA_PATH": str(folder),
        "OMP_NUM_THREADS": "1",
    }


def main() -> int:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    for tool in (CC, "nm"):
        if shutil.which(tool) is None:
            sys.exit(f"{tool} is not installed: this needs a C compiler and the GNU binary utilities")
    with tempfile.TemporaryDirectory() as folder:
        return subprocess.run([sys.executable, *sys.argv[1:]], env=os.environ | environment(Path(folder))).returncode


if __name__ == "__main__":
    sys.exit(main())
