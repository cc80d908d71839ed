"""What is kept of calls is bounded and shared by threads, and holds no kernel that was made for a profiler."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("Triton compiles nothing under TRITON_INTERPRET=1", allow_module_level=True)

from triton import knobs
from triton.runtime import driver

from attnplug import SDPAParams
from attnplug_flash_triton import impl, plans
from written_launches import Driver, tensors


def test_kernels_stay_loaded_as_long_as_they_are_launched(gpu: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else is kept of them: from 3.8 on Triton unloads what nothing refers to."""
    compiled: list[Any] = []

    def seen(launch: plans.Launch, kernel: Any, *others: Any) -> Any:
        compiled.append(weakref.ref(kernel))
        return of_launch(launch, kernel, *others)

    of_launch = plans._Compiled
    monkeypatch.setattr(plans, "_Compiled", seen)
    query, key, value = tensors(32, 32)
    impl.forward(SDPAParams(query, key, value, scale=0.1))
    impl.launches.forward_kernel.device_caches.clear()
    plans._compiled.clear()
    gc.collect()
    impl.forward(SDPAParams(query, key, value, scale=0.1))
    assert len(gpu.launched) == 2 and len(compiled) == 1 and compiled[0]() is not None


def test_what_is_kept_of_compiled_kernels_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "COMPILED_KEPT", 2)
    for size in (16, 24, 32, 40, 48):
        impl.forward(SDPAParams(*(tensor[..., :size] for tensor in tensors(32, 32)), scale=0.1))
        assert len(plans._compiled) <= 2


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(impl, "PLANS_KEPT", 4)
    for keys in range(20, 40):
        impl.forward(SDPAParams(*tensors(32, keys), scale=0.1))
        assert len(impl._plans) <= 4


def test_threads_share_what_is_kept_and_nothing_else(gpu: Driver) -> None:
    calls = [tensors(32, 32) for _ in range(8)]
    expected = {tuple(tensor.data_ptr() for tensor in call) for call in calls}
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda call: impl.forward(SDPAParams(*call, scale=0.1)), calls * 25))
    assert len(gpu.launched) == 200
    assert {launch[3:6] for launch in gpu.launched} == expected


def test_profilers_that_listen_to_triton_hear_of_repeated_launches() -> None:
    params, heard = SDPAParams(*tensors(32, 32), scale=0.1), []
    impl.forward(params)
    impl.forward(params)
    listen = heard.append
    knobs.runtime.launch_enter_hook.add(listen)
    try:
        # The launcher calls the hooks, and the driver here has none of its own: that it is given them is what counts.
        kept = next(iter(impl._plans.values()))
        assert plans._is_watched()
        given = impl.tensors_of(params)
        launched = len(driver.active.launched)
        kept.run(given, params.query.device)
        assert len(driver.active.launched) == launched + 1
    finally:
        knobs.runtime.launch_enter_hook.remove(listen)
    assert not plans._is_watched()


def test_what_a_profiler_had_compiled_runs_for_it_alone(gpu: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    params, instrumented = SDPAParams(*tensors(32, 32), scale=0.1), []

    def compiled(run: Any, *given: Any, **options: Any) -> Any:
        kernel = run(*given, **options)
        fields = {name: getattr(kernel, name) for name in ("function", "packed_metadata", "metadata")}
        return SimpleNamespace(run=lambda *launched: instrumented.append(launched), **fields)

    kernel, listen = impl.launches.forward_kernel, list.copy
    with monkeypatch.context() as patch:
        patch.setattr(kernel, "run", partial(compiled, kernel.run))
        knobs.runtime.launch_enter_hook.add(listen)
        try:
            for _ in range(2):
                impl.forward(params)
        finally:
            knobs.runtime.launch_enter_hook.remove(listen)
    for length in (32, 48):
        impl.forward(SDPAParams(*tensors(length, 32), scale=0.1))
    assert not instrumented and len(gpu.launched) == 4
