"""New processes that have imported torch already: forks of an interpreter that did nothing else.

attnplug reads its environment and finds plugins once in a process, so many tests need a process of their own, and to
import torch takes each of them longer than all the rest. Whoever asks what is imported needs a new interpreter instead.

The processes that pytest spreads tests over share what is started here, and nothing is before somebody asks.
"""

from __future__ import annotations

import atexit
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import forked_client

SECONDS = 600  # of a process that hangs: one that imports torch takes two minutes where twenty others run
WARM = {"torch": ["torch"], "dynamo": ["torch._dynamo", "torch._inductor.compile_fx"]}
"""What processes may have imported: nothing but torch, or what compiling with any backend needs."""

_FOLDER = "FORKED_SERVERS"  # the variable by which the process that starts others tells them where its servers listen
_SUPPORT = Path(__file__).parent


def listen() -> None:
    """Let servers wait for requests until this process ends, unless they do so for the one that started it."""
    if _FOLDER in os.environ:
        return
    folder, owner = Path(tempfile.mkdtemp(prefix="forked")), os.getpid()
    for name, modules in WARM.items():
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(folder / f"{name}.socket"))
            listener.listen()
            fd = listener.fileno()
            command = [sys.executable, str(_SUPPORT / "forked_server.py"), str(fd), *modules]
            _SERVERS.append(subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[fd], start_new_session=True))
        program = folder / name
        program.write_text(
            f"#!{sys.executable} -IS\nimport sys\nsys.path.append({str(_SUPPORT)!r})\n"
            f"import forked_client\nforked_client.main({str(folder / f'{name}.socket')!r})\n"
        )
        program.chmod(0o755)
    os.environ[_FOLDER] = str(folder)
    atexit.register(lambda: os.getpid() == owner and _end(folder))


_SERVERS: list[subprocess.Popen[bytes]] = []


def _end(folder: Path) -> None:
    """End the servers, and wait for them: of one that may still run Python warns."""
    for server in _SERVERS:
        server.terminate()
        server.communicate()  # closes its stdin, too
    shutil.rmtree(folder)


def python(warm: str = "torch") -> str:
    """Return a program that does what `sys.executable` does with a script, `-c` or `-m`, with modules imported."""
    return str(Path(os.environ[_FOLDER]) / warm)


def run(
    script: str, environment: Mapping[str, str] = os.environ, folder: Path | None = None, warm: str = "torch"
) -> subprocess.CompletedProcess[str]:
    """Run `script` as `python -c` would in `folder`, with this environment and what is `warm` imported."""
    with open(os.devnull) as nothing, tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        files = [nothing.fileno(), out.fileno(), err.fileno()]
        address = f"{python(warm)}.socket"
        status = forked_client.ask(address, ["-c", script], environment, str(folder or Path.cwd()), files, SECONDS)
        for file in (out, err):
            file.seek(0)
        return subprocess.CompletedProcess(script, status, out.read(), err.read())
