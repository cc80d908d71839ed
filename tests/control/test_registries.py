"""Activation is all or nothing, forks get free locks, and both registries say the same.

A failure halfway is planted in the private steps of an activation: from outside, there is none to provoke.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import textwrap
import threading
import warnings
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn import attention as theirs

import attnplug
import forked
from attnplug import ImplSpec

Q = torch.randn(1, 2, 4, 8)
ORIGINAL = F.scaled_dot_product_attention


class Provider:
    """A provider that says in a list what is done with it."""

    def __init__(self, name: str, said: list[str], error: BaseException | None = None) -> None:
        self.name, self.said, self.error = name, said, error
        attnplug.register_flash_attention_impl(name, register_fn=self)

    def __call__(self) -> Provider:
        if self.error is not None:
            raise self.error
        self.said.append(f"{self.name} on")
        return self

    def remove(self) -> None:
        self.said.append(f"{self.name} off")


def in_a_new_process(program: str) -> str:
    done = forked.run(textwrap.dedent(program))
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# --- all or nothing ---


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt, RuntimeError])
def test_a_patch_that_fails_halfway_leaves_pytorch_s_function_and_the_activation(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    said: list[str] = []
    Provider("one", said), Provider("other", said)
    original = F.scaled_dot_product_attention

    def fail(*_: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("attnplug._control.replacing.AfterImport.install", fail)
        with pytest.raises(error):
            attnplug.activate_flash_attention_impl("one")
        with pytest.raises(error):
            attnplug.patch_torch()
    assert F.scaled_dot_product_attention is original
    assert attnplug.current_flash_attention_impl() is None and said == []
    attnplug.activate_flash_attention_impl("one")
    with monkeypatch.context() as patch:
        patch.setattr("attnplug._control.activation.patch_torch", fail)
        with pytest.raises(error):
            attnplug.activate_flash_attention_impl("other")
    assert attnplug.current_flash_attention_impl() == "one" and said == ["one on"]


def test_a_patch_that_is_interrupted_at_any_line_is_gone() -> None:
    places = [(F, "scaled_dot_product_attention"), (F, "multi_head_attention_forward")]
    places.append((torch.backends.mha, "get_fastpath_enabled"))
    before, tracer = [getattr(module, name) for module, name in places], sys.gettrace()
    interrupted: set[tuple[str, int]] = set()

    def interrupt(frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_globals["__name__"] not in ("attnplug._control.patch", "attnplug._control.replacing"):
            return None
        line = frame.f_code.co_filename, frame.f_lineno
        if event == "line" and line not in interrupted:
            interrupted.add(line)
            raise KeyboardInterrupt
        return interrupt

    while True:
        sys.settrace(interrupt)
        try:
            handle = attnplug.patch_torch()
        except KeyboardInterrupt:
            assert [getattr(module, name) for module, name in places] == before, max(interrupted)
        else:
            break
        finally:
            sys.settrace(tracer)
    handle.remove()
    assert len(interrupted) > 20


class Interrupting:
    """A module in which whoever looks for PyTorch's function is interrupted, once."""

    looked = False

    def __getattribute__(self, name: str) -> Any:
        if name == "__dict__" and not Interrupting.looked:
            Interrupting.looked = True
            raise KeyboardInterrupt
        return super().__getattribute__(name)


@pytest.mark.parametrize("is_active", [False, True])
def test_what_is_interrupted_while_it_is_removed_is_gone(monkeypatch: pytest.MonkeyPatch, is_active: bool) -> None:
    if is_active:
        attnplug.activate_flash_attention_impl("aten_math")
        remove = attnplug.restore_flash_attention_impl
    else:
        remove = attnplug.patch_torch().remove
    assert F.scaled_dot_product_attention is not torch._C._nn.scaled_dot_product_attention
    Interrupting.looked = False
    monkeypatch.setitem(sys.modules, "interrupting", Interrupting())
    with pytest.raises(KeyboardInterrupt):
        remove()
    assert F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention
    assert attnplug.current_flash_attention_impl() is None


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_a_provider_that_fails_leaves_the_one_before_in_place(error: type[BaseException]) -> None:
    said: list[str] = []
    Provider("one", said), Provider("failing", said, error())
    attnplug.activate_flash_attention_impl("one")
    with pytest.raises(error):
        attnplug.activate_flash_attention_impl("failing")
    assert attnplug.current_flash_attention_impl() == theirs.current_flash_attention_impl() == "one"
    assert said == ["one on", "one off", "one on"]
    attnplug.restore_flash_attention_impl()
    assert F.scaled_dot_product_attention is ORIGINAL


def test_a_restore_that_fails_can_be_tried_again() -> None:
    said: list[str] = []
    provider = Provider("one", said)
    attnplug.activate_flash_attention_impl("one")

    def fail() -> None:
        raise OSError

    provider.remove = fail
    with pytest.raises(OSError):
        attnplug.restore_flash_attention_impl()
    assert attnplug.current_flash_attention_impl() == "one"
    del provider.remove
    attnplug.restore_flash_attention_impl()
    assert attnplug.current_flash_attention_impl() is None and said == ["one on", "one off"]


# --- forks ---


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("held", ["an activation", "the import of a kernel"])
def test_a_child_forked_while_another_thread_is_at_work_is_free(held: str) -> None:
    entered, go = threading.Event(), threading.Event()

    def wait() -> None:
        entered.set()
        go.wait(60)

    class Slow:
        def forward(self, params: Any) -> Any:
            return params.query, None

        def __getattr__(self, name: str) -> Any:  # asked for when the kernel is loaded
            if name == "backward":
                wait()
            raise AttributeError(name)

    def work() -> None:
        if held == "an activation":
            attnplug.activate_flash_attention_impl("slow")
        else:
            attnplug.scaled_dot_product_attention(Q, Q, Q, impl="loading")

    class Handle:
        def remove(self) -> None:
            """Nothing was registered."""

    def provide() -> Handle:
        wait()
        attnplug.list_impls()  # which needs a lock that the fork must not have taken yet
        return Handle()

    attnplug.register_flash_attention_impl("slow", register_fn=provide)
    attnplug.register_impl(ImplSpec(name="loading", kernel=Slow(), backend=None))
    worker = threading.Thread(target=work)
    worker.start()
    assert entered.wait(60)
    threading.Timer(0.2, go.set).start()  # the fork waits for it
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            attnplug.activate_flash_attention_impl("aten_math")
            F.scaled_dot_product_attention(Q, Q, Q)
            attnplug.scaled_dot_product_attention(Q, Q, Q, impl="loading")
        os._exit(0)
    worker.join(60)
    assert os.waitpid(child, 0)[1] == 0


# --- nothing is left of what was unregistered ---


class Kernel:
    """A kernel that can be referred to weakly."""

    def forward(self, params: Any) -> Any:
        return params.query * 2, None


def test_registering_and_unregistering_leaves_no_name_and_no_kernel() -> None:
    attnplug.list_impls()
    names = theirs.list_flash_attention_impls()
    kernels = []
    for turn in range(300):
        kernel = Kernel()
        kernels.append(weakref.ref(kernel))
        attnplug.register_impl(ImplSpec(name=f"passing_{turn}", kernel=kernel, backend=None))
        if turn % 10 == 0:
            with attnplug.sdpa_kernel(f"passing_{turn}"):
                attnplug.scaled_dot_product_attention(Q, Q, Q)
        attnplug.unregister_impl(f"passing_{turn}")
    del kernel
    gc.collect()
    assert theirs.list_flash_attention_impls() == names
    assert not any(reference() for reference in kernels)


# --- two registries ---


def both() -> tuple[str | None, str | None]:
    return attnplug.current_flash_attention_impl(), theirs.current_flash_attention_impl()


Switch = Callable[[str], None]


@pytest.mark.parametrize("on", [attnplug.activate_flash_attention_impl, theirs.activate_flash_attention_impl])
@pytest.mark.parametrize("off", [attnplug.restore_flash_attention_impl, theirs.restore_flash_attention_impl])
def test_both_registries_say_the_same_whoever_switches(on: Switch, off: Callable[[], None]) -> None:
    attnplug.list_impls()
    on("aten_math")
    assert both() == ("aten_math", "aten_math")
    attnplug.activate_flash_attention_impl("aten_flash")
    assert both() == ("aten_flash", "aten_flash")
    theirs.activate_flash_attention_impl("aten_math")
    assert both() == ("aten_math", "aten_math")
    off()
    assert both() == (None, None)


def test_several_providers_registered_with_pytorch_before_the_first_use_appear_and_ours_there() -> None:
    printed = in_a_new_process("""
        from torch.nn import attention
        for name in ("x", "y", "z"):
            attention.register_flash_attention_impl(name, register_fn=lambda: None)
        import attnplug
        ours, theirs = attnplug.list_flash_attention_impls(), attention.list_flash_attention_impls()
        print({"x", "y", "z"} <= set(ours), set(ours) == set(theirs))
    """)
    assert printed == "True True"


def test_a_provider_whose_name_cannot_be_had_here_is_left_out_and_breaks_nothing() -> None:
    printed = in_a_new_process("""
        import warnings
        import torch
        from torch.nn import attention
        for name in ("two words", "Math"):
            attention.register_flash_attention_impl(name, register_fn=lambda: None)
        import attnplug
        query = torch.ones(1, 1, 2, 4)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            attnplug.scaled_dot_product_attention(query, query, query, impl="aten_math")
            attention.register_flash_attention_impl("later", register_fn=lambda: None)
            names = attnplug.list_flash_attention_impls()
        print("later" in names, "Math" in names, *(str(each.message) for each in said), sep="\\n")
    """)
    assert printed.splitlines() == [
        "True",
        "False",
        "provider 'Math' of torch.nn.attention is left out: ImplSpec.name: 'Math' is the name of a family of "
        "implementations; choose another",
        "provider 'two words' of torch.nn.attention is left out: ImplSpec.name: 'two words' is not a name; start with "
        "a letter and use letters, digits, '_', '-', '.'",
    ]


@pytest.mark.parametrize("name", ["two words", "EFFICIENT_ATTENTION", "math"])
def test_a_provider_needs_a_name_that_means_nothing_else(name: str) -> None:
    with pytest.raises(ValueError, match=f"impl: '{name}' is "):
        attnplug.register_flash_attention_impl(name, register_fn=lambda: None)
    assert name not in attnplug.list_flash_attention_impls()


def test_a_provider_registered_with_pytorch_later_is_listed() -> None:
    assert (
        in_a_new_process("""
        from torch.nn import attention
        import attnplug
        attnplug.list_impls()
        attention.register_flash_attention_impl("later", register_fn=lambda: None)
        print("later" in attnplug.list_flash_attention_impls(), "later" in [r.name for r in attnplug.list_impls()])
    """)
        == "True True"
    )


def test_threads_whose_first_use_is_at_once_all_see_the_providers_of_pytorch() -> None:
    """Nobody may see a registry that they have not been brought into yet, nor bring them in a second time."""
    shown = in_a_new_process("""
        import sys, threading
        import torch.nn.attention as theirs
        import attnplug
        for number in range(5):
            theirs.register_flash_attention_impl(f"provider{number}", register_fn=lambda: None)
        attnplug.current_flash_attention_impl  # which imports what follows PyTorch's registry
        sys.setswitchinterval(1e-4)
        counts, barrier = [], threading.Barrier(4)
        def first():
            barrier.wait()
            counts.append(sum(name.startswith("provider") for name in attnplug.list_flash_attention_impls()))
        threads = [threading.Thread(target=first) for _ in range(4)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        print(counts)
    """)
    assert shown.strip() == str([5] * 4)
