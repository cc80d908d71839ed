"""Kernels that are right until one check asks for something that takes their process down; a worker imports them."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import torch
from torch import Tensor

from attnplug import SDPAParams

TRIGGER = 0.05
"""A scale that check_scale alone asks for."""
WORDS = "CUDA error: misaligned address"


class Faulty:
    composite = True

    def forward(self, params: SDPAParams) -> tuple[Tensor, None]:
        if params.scale == TRIGGER:
            self.fault()
        logits = params.scale * params.query @ params.key.mT
        return torch.softmax(logits, -1) @ params.value, None

    def fault(self) -> None:
        raise NotImplementedError


class WrongTogether(Faulty):
    """Right for each feature by itself; of two pairs it gets one wrong, and crashes at the other."""

    def forward(self, params: SDPAParams) -> tuple[Tensor, None]:
        logits, mask = params.scale * params.query @ params.key.mT, params.attn_mask
        if params.is_causal and mask is None:
            mask = torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
        if mask is not None:
            logits = logits.masked_fill(~mask, float("-inf"))
            if params.value.shape[-1] != params.key.shape[-1]:
                os.kill(os.getpid(), signal.SIGSEGV)
        return torch.softmax(logits, -1).nan_to_num() @ params.value, None


class Crashes(Faulty):
    def fault(self) -> None:
        print("about to read what is not there", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)


class Exits(Faulty):
    def fault(self) -> None:
        os._exit(3)


class Quits(Faulty):
    def fault(self) -> None:
        sys.exit()


class Hangs(Faulty):
    def fault(self) -> None:
        time.sleep(600)


class LosesTheDevice(Faulty):
    """Fails, and from then on everything fails, as after a fault on a GPU."""

    def fault(self) -> None:
        def unusable(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError(WORDS)

        for name in ("zeros", "ones", "randn", "rand", "full", "arange", "softmax"):
            setattr(torch, name, unusable)
        unusable()


class LosesTheDeviceLater(Faulty):
    """Returns a right result; that the device is lost shows only to whoever waits for it."""

    def fault(self) -> None:
        def unusable(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError(WORDS)

        torch.cpu.synchronize = unusable


class Prints(Faulty):
    def fault(self) -> None:
        print("a word on stdout, where results go")
        os.write(1, b"and one past Python")


crashes, exits, quits, hangs, loses, loses_later, prints = (
    kind() for kind in (Crashes, Exits, Quits, Hangs, LosesTheDevice, LosesTheDeviceLater, Prints)
)
wrong_together = WrongTogether()
