"""Has a process made by `forked_server.py`, and ends as it ends. Imports little, because it is started often."""

from __future__ import annotations

import marshal
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence


def ask(
    address: str,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    folder: str,
    files: list[int],
    seconds: float | None = None,
) -> int:
    """Run `python ARGUMENTS` with these files as stdin, stdout and stderr; return the status as `subprocess` does.

    Raises:
        TimeoutError: the process has not ended in so many seconds, and is ended.
        ConnectionError: the server ended before the process did.
    """
    request = marshal.dumps((list(arguments), dict(environment), folder))
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(seconds)
        connection.connect(address)
        socket.send_fds(connection, [len(request).to_bytes(8, "big")], files)
        connection.sendall(request)
        answer = connection.recv(16)
        if not answer:
            raise ConnectionError("the server of new processes has ended")
        return int(answer)


def main(address: str) -> None:
    """Stand in for Python: run what the command line says, with the files, environment and folder of this process."""
    status = ask(address, sys.argv[1:], os.environ, os.getcwd(), [0, 1, 2])
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)
