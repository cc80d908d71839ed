"""One program at work: its partitions as threads, of which one runs at a time, and its copies under way."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from gluon_emulator.events import Cell, Clock, Fault

if TYPE_CHECKING:
    from gluon_emulator.copies import Product
    from gluon_emulator.memory import Barrier


class Thread:
    """One partition: its clock, and the products and stores that it has begun."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.clock = Clock({name: 1})
        self.products: list[Product] = []
        self.stores: list[Callable[[], None]] = []
        self.turn = _locked()
        self.waits_for: Callable[[], bool] | None = None
        self.ended = False

    @property
    def now(self) -> tuple[str, int]:
        return self.name, self.clock[self.name]

    def step(self) -> None:
        self.clock[self.name] += 1


class Program:
    """One program at work: its threads, its copies under way, and who is next."""

    current: Program | None = None

    def __init__(self, number: int, seed: int) -> None:
        self.number = number
        self.random = random.Random(seed)
        self.late = seed % 3
        self.threads: list[Thread] = []
        self.copies: list[Callable[[], None]] = []
        self.copied = 0
        self.allocations = 0
        self.cells: list[Cell] = []
        self.barriers: list[Barrier] = []
        self.fault: BaseException | None = None
        self.local = threading.local()
        self.local.thread = Thread("program")
        self.favourite = self.random.choice((None, 0, 1, 2, 3))
        self.over = _locked()

    @property
    def thread(self) -> Thread:
        thread: Thread = self.local.thread
        return thread

    def is_late(self) -> bool:
        """Whether an asynchronous read happens at the wait for it; else at once."""
        return (False, True, self.random.random() < 0.5)[self.late]

    def run(self, partitions: Iterable[tuple[Callable[..., Any], tuple[Any, ...]]]) -> None:
        before = self.thread
        workers = []
        for i, (function, arguments) in enumerate(partitions):
            thread = Thread(f"partition {i} ({function.__name__})")
            thread.clock.join(before.clock)
            self.threads.append(thread)
            workers.append(threading.Thread(target=self._partition, args=(thread, function, arguments), daemon=True))
        for worker in workers:
            worker.start()
        self._next()
        self.over.acquire()
        for worker in workers:
            worker.join()
        if self.fault is not None:
            raise self.fault
        if self.copies:
            raise Fault("the program ends before what it loads has arrived")

    def _partition(self, thread: Thread, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        thread.turn.acquire()
        self.local.thread = thread
        try:
            if self.fault is None:
                function(*arguments)
                if thread.stores or thread.products:
                    raise Fault(f"{thread.name} ends before its stores and products are over")
        except BaseException as fault:  # raised again by the thread that waits for this one
            self.fault = self.fault or fault
        thread.ended = True
        self._next()

    def yield_(self, waits_for: Callable[[], bool] | None = None) -> None:
        """Let others go on, at least until `waits_for` holds."""
        if not self.threads:
            if waits_for is not None and not waits_for():
                raise Fault("a program waits before it has partitions")
            return
        thread = self.thread
        thread.waits_for = waits_for
        self._next()
        thread.turn.acquire()
        thread.waits_for = None
        if self.fault is not None:
            raise Fault("stopped, because of a fault elsewhere") from self.fault

    def _next(self) -> None:
        left = [thread for thread in self.threads if not thread.ended]
        if not left:
            self.over.release()
            return
        while True:
            if self.fault is not None:
                left[0].turn.release()
                return
            ready = [thread for thread in left if thread.waits_for is None or thread.waits_for()]
            if self.copies and (not ready or self.random.random() < 0.2):
                self.copies.pop(self.random.randrange(len(self.copies)))()
                continue
            if not ready:
                waiting = "; ".join(f"{thread.name} waits" for thread in left)
                self.fault = Fault(f"deadlock: {waiting}")
                continue
            favourite = self.favourite
            if favourite is not None and favourite < len(self.threads) and self.threads[favourite] in ready:
                ready = [self.threads[favourite]]
            self.random.choice(ready).turn.release()
            return


def _locked() -> threading.Lock:
    """Return a lock that one thread waits for, and that another one releases: a semaphore in Python takes longer."""
    lock = threading.Lock()
    lock.acquire()
    return lock


def current() -> Program:
    """Return the program that runs."""
    assert Program.current is not None
    return Program.current
