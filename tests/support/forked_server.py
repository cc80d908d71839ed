"""Imports modules once, and then is forked for each process that `forked_client.py` asks for.

Run as `forked_server.py FD MODULE...`, where FD is a socket that listens. Nothing is imported before the first request.
It ends when its stdin does, and a process that it made ends when who asked for it does.
"""

import atexit
import contextlib
import gc
import importlib
import marshal
import os
import runpy
import select
import signal
import socket
import sys
import threading
import types


def serve(listener: socket.socket, modules: list[str]) -> None:
    select.select([0, listener], [], [])
    for module in modules:
        importlib.import_module(module)
    gc.freeze()
    running: dict[int, tuple[int, socket.socket]] = {}  # of each process: by what it is waited for, number, who asked
    while True:
        asking = [connection for _, connection in running.values()]
        ready, _, _ = select.select([0, listener, *running, *asking], [], [])
        if 0 in ready:
            os._exit(0)  # to take torch apart takes half a second
        for number, connection in running.values():
            if connection in ready:
                os.kill(number, signal.SIGKILL)  # nobody waits for it any longer
        for handle in [each for each in running if each in ready]:
            number, connection = running.pop(handle)
            os.close(handle)
            status = os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])
            with connection, contextlib.suppress(BrokenPipeError):
                connection.send(str(status).encode())
        if listener in ready:
            connection, _ = listener.accept()
            length, files, _, _ = socket.recv_fds(connection, 8, 3)
            with connection.makefile("rb") as stream:
                request = marshal.loads(stream.read(int.from_bytes(length, "big")))
            number = os.fork()
            if number == 0:
                become(*request, files)
            for file in files:
                os.close(file)
            running[os.pidfd_open(number)] = number, connection


def become(arguments: list[str], environment: dict[str, str], folder: str, files: list[int]) -> None:
    """Be `python ARGUMENTS`, and never return."""
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    status = 0
    try:
        _run(*arguments)
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        if isinstance(leaving.code, str):
            sys.stderr.write(f"{leaving.code}\n")
    except BaseException as error:  # an interpreter, too, shows whatever ends its program
        at = error.__traceback__
        while at is not None and at.tb_frame.f_code.co_filename in (__file__, runpy.__file__, "<frozen runpy>"):
            at = at.tb_next
        sys.excepthook(type(error), error.with_traceback(at), at)
        status = 1
    threading._shutdown()  # what the end of an interpreter does, but for taking torch apart
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status & 0xFF)


def _run(what: str, *rest: str) -> None:
    first = {"-c": "", "-m": os.getcwd()}.get(what, os.path.dirname(os.path.abspath(what)))
    sys.path[:1] = [first, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    if what == "-c":
        sys.argv = ["-c", *rest[1:]]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), vars(main))
    elif what == "-m":
        sys.argv = list(rest)
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        assert not what.startswith("-"), f"{what} is for a new interpreter"
        sys.argv = [what, *rest]
        runpy.run_path(what, run_name="__main__")


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2:])
