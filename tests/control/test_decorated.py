"""A scope that decorates: functions, coroutines, generators, and whatever else is called, have it while they run."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator
from typing import Any

import pytest

import attnplug
from attending import DEFAULT, FLASH, MATH, ran


def test_a_coroutine_s_with_block_is_the_thread_s_until_it_is_left() -> None:
    seen: list[str] = []

    async def attend() -> None:
        with attnplug.sdpa_kernel(MATH):
            await asyncio.sleep(0)

    async def look() -> None:
        seen.append(ran())

    async def both() -> None:
        await asyncio.gather(attend(), look())
        seen.append(ran())

    asyncio.run(both())
    assert seen == [MATH, DEFAULT]


def test_tasks_that_leave_in_the_order_in_which_they_entered_leave_nothing() -> None:
    async def attend(name: str, seconds: float) -> None:
        with attnplug.sdpa_kernel(name):
            await asyncio.sleep(seconds)

    async def all_of_them() -> None:
        await asyncio.gather(*(attend(name, 0.01 * turn) for turn, name in enumerate([MATH, FLASH] * 3)))

    asyncio.run(all_of_them())
    assert ran() == DEFAULT


def test_a_decorated_coroutine_has_its_scope_and_nobody_else() -> None:
    @attnplug.sdpa_kernel(MATH)
    async def attend() -> list[str]:
        before = ran()
        await asyncio.sleep(0)
        return [before, ran()]

    async def look() -> list[str]:
        before = ran()
        await asyncio.sleep(0)
        return [before, ran()]

    async def both() -> Any:
        return await asyncio.gather(attend(), look(), attend())

    assert asyncio.iscoroutinefunction(attend)
    assert asyncio.run(both()) == [[MATH] * 2, [DEFAULT] * 2, [MATH] * 2]


def test_a_decorated_coroutine_that_is_cancelled_cleans_up_in_its_scope() -> None:
    seen = []

    @attnplug.sdpa_kernel(MATH)
    async def attend() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            seen.append(ran())

    async def cancel() -> None:
        task = asyncio.ensure_future(attend())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(cancel())
    assert seen == [MATH] and ran() == DEFAULT


def test_a_decorated_generator_has_its_scope_at_each_step_and_its_caller_never() -> None:
    @attnplug.sdpa_kernel(MATH)
    def steps() -> Any:
        seen = [ran()]
        try:
            while len(seen) < 3:
                try:
                    seen.append((yield ran()) + ran())
                except KeyError:
                    seen.append(ran())
            return seen
        finally:
            closed.append(ran())

    closed: list[str] = []
    generator = steps()
    assert [next(generator), ran()] == [MATH, DEFAULT]
    assert [generator.send("sent "), ran()] == [MATH, DEFAULT]
    with pytest.raises(StopIteration) as stopped:
        generator.throw(KeyError)
    assert stopped.value.value == [MATH, "sent " + MATH, MATH]
    other = steps()
    next(other)
    other.close()
    assert closed == [MATH, MATH] and ran() == DEFAULT


async def _asynchronous_generator() -> AsyncIterator[None]:
    yield


class _Function:
    """An object that is called like a function."""

    def __call__(self) -> str:
        return ran()

    @attnplug.sdpa_kernel(MATH)
    def method(self) -> str:
        return ran()

    @staticmethod
    @attnplug.sdpa_kernel(MATH)
    def static() -> str:
        return ran()

    @classmethod
    @attnplug.sdpa_kernel(MATH)
    def of_class(cls) -> str:
        return ran()


def test_whatever_is_called_can_be_decorated() -> None:
    decorate = attnplug.sdpa_kernel(MATH)
    functions = [ran, lambda: ran(), functools.partial(ran), _Function(), _Function().method]
    assert [decorate(function)() for function in functions] == [MATH] * len(functions)
    assert [_Function().method(), _Function.static(), _Function.of_class()] == [MATH] * 3
    assert ran() == DEFAULT


@pytest.mark.parametrize(
    "function",
    [_asynchronous_generator, functools.partial(_asynchronous_generator), _Function, staticmethod(ran), 3, None],
)
def test_what_cannot_be_decorated_is_refused_at_once(function: Any) -> None:
    with pytest.raises(TypeError, match="sdpa_kernel (cannot decorate|decorates)"):
        attnplug.sdpa_kernel(MATH)(function)
