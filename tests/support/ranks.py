"""Worlds of processes that take one task after the other.

They are forked from one process, which has imported torch for all of them and has run nothing.
"""

from __future__ import annotations

import multiprocessing
import queue
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

TIMEOUT = timedelta(seconds=60)
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "torch.distributed.device_mesh",
        "torch.fx.experimental.symbolic_shapes",  # which autograd imports when a gradient is given
        "torch._dynamo",  # each rank that compiles would import it
        "attnplug.parallel",
        "attnplug.testing",
    ]
)


class World:
    """Processes, each a rank of a gloo group, that run functions of importable modules.

    Args:
        ranks: how many.
        folder: where their store is.
        timeout: of the group.
    """

    def __init__(self, ranks: int, folder: Path, timeout: timedelta = TIMEOUT) -> None:
        self.ranks = ranks
        self._tasks = [_context.SimpleQueue() for _ in range(ranks)]
        self._results = _context.Queue()
        arguments = (ranks, str(folder / "store"), timeout, self._results)
        self.processes = [
            _context.Process(target=_rank, args=(rank, self._tasks[rank], *arguments), daemon=True)
            for rank in range(ranks)
        ]
        for process in self.processes:
            process.start()

    def start(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> None:
        """Give every rank `function(*arguments, **named)` to run."""
        for tasks in self._tasks:
            tasks.put((function, arguments, named))

    def results(self, ranks: int | None = None) -> list[Any]:
        """Return what each rank returned, or the text of what it raised, an `AssertionError`."""
        found: dict[int, Any] = {}
        for _ in range(self.ranks if ranks is None else ranks):
            try:
                rank, good, result = self._results.get(timeout=240)
            except queue.Empty:
                raise AssertionError(f"only ranks {sorted(found)} of {self.ranks} have answered") from None
            found[rank] = result if good else AssertionError(result)
        return [found.get(rank) for rank in range(self.ranks)]

    def run(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> list[Any]:
        """Run a function on each rank and return the results; the first failure is raised."""
        self.start(function, *arguments, **named)
        results = self.results()
        for rank, result in enumerate(results):
            if isinstance(result, AssertionError):
                raise AssertionError(f"rank {rank}: {result}")
        return results

    def close(self) -> None:
        for tasks, process in zip(self._tasks, self.processes, strict=True):
            if process.is_alive():
                tasks.put(None)
        for process in self.processes:
            process.join(5)
            if process.is_alive():
                process.terminate()
                process.join()


def _rank(rank: int, tasks: Any, ranks: int, store: str, timeout: timedelta, results: Any) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timeout)
    while (task := tasks.get()) is not None:
        function, arguments, named = task
        try:
            results.put((rank, True, function(*arguments, **named)))
        except BaseException as error:  # the test that waits must hear of it
            traceback.print_exc()
            results.put((rank, False, f"{type(error).__name__}: {error}"))
    dist.destroy_process_group()
