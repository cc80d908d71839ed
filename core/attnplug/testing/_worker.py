"""A process that makes one check after another for another process: `python -m attnplug.testing._worker`.

What a kernel prints goes to stderr; the real stdout carries results.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import sys
from typing import Any


def main() -> None:
    """Answer each pickled `(task, seconds)` on stdin with a pickled `(result, lost)`, until one costs the device."""
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)
        faulthandler.enable()

        def answer(message: Any) -> None:
            pickle.dump(message, answers)
            answers.flush()

        import torch

        import attnplug
        from attnplug.testing import all_checks

        # What is imported once is no part of a check's time: checks, plugins, and sympy, by the first backward.
        all_checks(), attnplug.list_impls()
        one = torch.ones(1, requires_grad=True)
        torch.autograd.grad(one * 1, one, torch.ones(1))
        answer(attnplug.__version__)
        while True:
            try:
                task, seconds = pickle.load(sys.stdin.buffer)
            except EOFError:
                return
            faulthandler.dump_traceback_later(seconds)
            result, lost = task.run()
            faulthandler.cancel_dump_traceback_later()
            answer((result, lost))
            if lost:
                os._exit(0)  # an orderly exit would wait for the device


if __name__ == "__main__":
    main()
