"""The CUDA context of a thread, which libraries that make tensor maps on the host expect to be there.

A thread has no context until something in it needs one. Where its first call of CUDA is a library's, and the memory for
that comes out of PyTorch's cache, the driver refuses to make a tensor map ("invalid device context"). What CUTLASS then
hands to its kernel is no map, and the kernel ends with "an illegal instruction was encountered".
"""

from __future__ import annotations

import threading

import torch

_thread = threading.local()


def bind() -> None:
    """Give this thread the context of its device, if this was not done before. 0.1 us from then on.

    `set_device` does, for the device that is the current one too (pytorch#155900, in 2.9), also while a CUDA graph is
    captured. Later changes of device bind the context of the other device by themselves.
    """
    if not hasattr(_thread, "bound") and torch.cuda.is_initialized():
        torch.cuda.set_device(torch.cuda.current_device())
        _thread.bound = True
