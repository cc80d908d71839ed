"""New processes that have imported torch already: forks of an interpreter that did nothing else.

attnplug reads its environment and finds plugins once in a process, so many tests need a process of their own, and to
import torch takes each of them longer than all the rest. Whoever asks what is imported needs a new interpreter instead.
"""

from __future__ import annotations

import functools
import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

SECONDS = 120

_SERVER = """
import json, os, sys, traceback
import torch

for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if child == 0:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()

for number, path in enumerate([os.devnull, request["stdout"], request["stderr"]]):
    os.dup2(os.open(path, os.O_WRONLY if number else os.O_RDONLY), number)
os.environ.clear()
os.environ.update(request["environment"])
os.chdir(request["folder"])
sys.path[1:1] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
status = 0
try:
    exec(compile(request["script"], "<string>", "exec"))
except SystemExit as leaving:
    status = int(leaving.code or 0)
except BaseException:
    traceback.print_exc()
    status = 1
sys.stdout.flush()
sys.stderr.flush()
os._exit(status)  # to take torch apart takes half a second
"""


@functools.cache
def _server() -> subprocess.Popen[str]:
    """Start the interpreter that is forked. It ends with this process, whose end closes its input."""
    return subprocess.Popen([sys.executable, "-c", _SERVER], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def run(
    script: str, environment: Mapping[str, str] = os.environ, folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `script` as `python -c` would in `folder`, with this environment and torch imported."""
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
        files = {"stdout": out.name, "stderr": err.name}
        request = {"script": script, "environment": dict(environment), "folder": str(folder or Path.cwd()), **files}
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        if not select.select([server.stdout], [], [], SECONDS)[0]:
            server.kill()
            _server.cache_clear()
            raise subprocess.TimeoutExpired(script, SECONDS)
        return subprocess.CompletedProcess(script, int(server.stdout.readline()), out.read(), err.read())
