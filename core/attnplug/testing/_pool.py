"""Checks in worker processes: a kernel that crashes its process costs one check, and several compile at once.

A fault on a GPU ends the CUDA context of the process, and everything that it does afterwards fails. So a worker that
lost its device, died or did not answer in time is replaced, and the check that it was running has failed.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any

from attnplug.testing._report import Result
from attnplug.testing._tasks import Task

STARTING = 300.0
"""Seconds that a worker may take to import torch and attnplug."""
_GRACE, _TOLD = 2.0, 12
_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"  # PyTorch reads it once; without it, it refuses products in deterministic mode


class Worker:
    """One process that runs checks, replaced when a check has crashed it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._before = ""  # the check before, once there was one
        self._lock = threading.Lock()
        self._closed = False

    def run(self, task: Task, timeout: float) -> Result:
        """Run a check; if that crashes the process, the check has failed.

        Raises:
            RuntimeError: no worker could be started, the first time; or this one was closed.
        """
        start = time.perf_counter()
        try:
            process = self._started()
        except RuntimeError as error:
            if self._closed or not self._before:
                raise
            return task.failed(str(error), time.perf_counter() - start)
        early = f" before this check, after {self._before or 'it began'}" if process.poll() is not None else ""
        self._before = task.check
        try:
            answer = self._ask(process, (task, timeout), timeout + _GRACE)
        except queue.Empty:
            reason = f"did not end within {timeout:g} s"
        else:
            if isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[0], Result):
                result, lost = answer
                if lost:
                    self._end()
                return result
            try:
                reason = f"ended its process{early}: {_how(process.wait(_GRACE))}"
            except subprocess.TimeoutExpired:
                reason = f"answered with something other than a result: {type(answer).__name__}"
        self._end()
        return task.failed(f"{reason}{self._told()}", time.perf_counter() - start)

    def _ask(self, process: subprocess.Popen[bytes], message: Any, timeout: float) -> Any:
        """Return what the process answers, whatever it is; None if it reads no more."""
        assert process.stdin is not None
        try:
            pickle.dump(message, process.stdin)
            process.stdin.flush()
        except OSError:
            return None
        return self._answers.get(timeout=timeout)

    def close(self) -> None:
        """End the process; it can be called from another thread."""
        with self._lock:
            self._closed = True
        self._end()

    def _started(self) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._closed:
                raise RuntimeError("the worker was closed")
            if self._process is not None:
                return self._process
            self._errors = tempfile.TemporaryFile()  # noqa: SIM115, read after the process has ended
            self._answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
            try:
                self._process = process = subprocess.Popen(
                    [sys.executable, "-m", "attnplug.testing._worker"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self._errors,
                    env={_WORKSPACE: ":4096:8", **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                )
            except OSError as error:
                raise RuntimeError(f"no worker could be started: {error}") from error
            threading.Thread(target=_read, args=(process, self._answers), daemon=True).start()
        try:
            greeting = self._answers.get(timeout=STARTING)
        except queue.Empty:
            self._end()
            raise RuntimeError(
                f"no worker could be started: it did not answer within {STARTING:g} s{self._told()}"
            ) from None
        if type(greeting) is not str:
            code = self._end(_GRACE)
            raise RuntimeError(f"no worker could be started: {_how(code)}{self._told()}")
        return process

    def _end(self, patience: float = 0.0) -> int | None:
        """End the process, if it does not end by itself; return its exit status, None if it cannot be ended."""
        with self._lock:
            process, self._process = self._process, None
        if process is None:
            return None
        assert process.stdin is not None
        with contextlib.suppress(OSError):
            process.stdin.close()
        for seconds in (patience, 5 * _GRACE):
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(seconds)
            process.kill()
        return None  # stuck in the driver: the system ends it when that returns

    def _told(self) -> str:
        """Return the last lines that the process wrote to stderr, or the innermost of a stack that it shows."""
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        stacks = [at for at, line in enumerate(lines) if line.endswith("(most recent call first):")]
        shown = lines[max(0, stacks[-1] - _TOLD // 2) : stacks[-1] + _TOLD // 2] if stacks else lines[-_TOLD:]
        return "".join(f"\n{line}" for line in shown)


def _read(process: subprocess.Popen[bytes], answers: queue.SimpleQueue[Any]) -> None:
    """Put each answer into the queue, and at last what says that there will be no more.

    A process that dies while it writes, or a kernel that writes where answers go, leaves bytes of which `pickle` may
    make anything: another object, or any error.
    """
    assert process.stdout is not None
    with process.stdout as stream:
        while True:
            try:
                answers.put(pickle.load(stream))
            except Exception as error:  # any, as said above
                answers.put(error)
                return


def _how(code: int | None) -> str:
    if code is None:
        return "it cannot be ended"
    if code >= 0:
        return f"exit status {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def run_all(
    tasks: Sequence[Task], workers: int, timeout: float, on_result: Callable[[int, Result], None]
) -> list[Result]:
    """Run checks in several processes at once, the last first: those take longest.

    Args:
        tasks: what to make.
        workers: how many processes.
        timeout: seconds that each check has.
        on_result: called with the position of each result and the result, as it is found, in one thread at a time.

    Returns:
        The results in the order of `tasks`.
    """
    results: dict[int, Result] = {}
    left = list(enumerate(tasks))
    lock = threading.Lock()
    crew = [Worker() for _ in range(min(workers, len(tasks)))]

    def serve(worker: Worker) -> None:
        while True:
            with lock:
                if not left:
                    return
                position, task = left.pop()
            result = worker.run(task, timeout)
            with lock:
                results[position] = result
                on_result(position, result)

    with ThreadPoolExecutor(max(1, len(crew))) as threads:
        serving = [threads.submit(serve, worker) for worker in crew]
        try:
            wait(serving, return_when=FIRST_EXCEPTION)
        finally:
            with lock:
                left.clear()
            for worker in crew:
                worker.close()
    for each in serving:
        each.result()
    return [results[position] for position in range(len(tasks))]
