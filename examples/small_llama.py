"""Tune a small Llama, unmodified: its attention is measured as it generates and as it trains, and the fastest is used.

The model is made by transformers from a configuration, with random weights; nothing is downloaded. One run of
`generate` with its cache of keys and values, and one step of training, are captured; `attnplug.tune` measures every
kind of call among them with each implementation; then both are timed with and without what was chosen, in turns.

    python examples/small_llama.py --device cpu --dtype float32

Ends with status 1 if with the choices in use the logits, or the gradients of the embedding, are further from PyTorch's
than rounding explains.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tuned import chosen, with_and_without

import attnplug

LAYERS, HEADS, KV_HEADS, HIDDEN, VOCABULARY = 4, 8, 4, 256, 512
SEQUENCES, PROMPT, NEW, TRAINED = 2, 40, 20, 128  # generated lengths from 41 to 59: one kind of call
TUNING = 0.05  # seconds for each implementation on each kind of call, for each direction
COMPILED_FOR_EACH_SIZE = ("flex",)  # on a CPU: that takes longer than all the rest
ERRORS_APART = 4  # as far as the contract lets two kernels be, and one more for luck


@dataclass
class Found:
    """What the model computed: logits `(sequences, tokens, vocabulary)`, and the gradient of its embedding."""

    logits: Tensor
    gradient: Tensor


class Llama:
    """A small Llama with random weights, and what is done with it."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=2 * HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            bos_token_id=1,
            eos_token_id=None,
        )
        self.model: Any = LlamaForCausalLM(config).to(device, dtype)
        self.prompt, self.text = (
            torch.randint(2, VOCABULARY, (SEQUENCES, length), device=device) for length in (PROMPT, TRAINED)
        )

    def generate(self) -> None:
        """Generate, one token after the other, with a cache of keys and values."""
        mask = torch.ones_like(self.prompt)
        self.model.generate(self.prompt, attention_mask=mask, max_new_tokens=NEW, do_sample=False)

    def train(self) -> Found:
        """Make one step of training, without changing the weights."""
        self.model.zero_grad()
        answered = self.model(self.text, labels=self.text)
        answered.loss.backward()
        return Found(answered.logits.detach(), self.model.get_input_embeddings().weight.grad.clone())

    def exact(self) -> Found:
        """Do the same in float64 with a copy of the model, to know how far off rounding alone can be."""
        exact = copy.copy(self)
        exact.model = copy.deepcopy(self.model).double()
        return exact.train()

    def seconds(self, run: Any) -> float:
        """Time something that is done with the model."""
        self._wait()
        start = time.perf_counter()
        run()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.text.is_cuda:
            torch.cuda.synchronize(self.text.device)


def tune(llama: Llama) -> attnplug.Choices:
    """Capture what generating and training call, and measure it."""
    with attnplug.capture() as cases:
        llama.generate()
        llama.train()
    left_out = COMPILED_FOR_EACH_SIZE if llama.text.device.type == "cpu" else ()
    names = [each.name for each in attnplug.list_impls() if each.status == "available" and each.name not in left_out]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", attnplug.ChoicesWarning)  # of a busy machine; the notes say it too
        return attnplug.tune(cases, names, seconds=TUNING)


def ran(choices: attnplug.Choices, llama: Llama) -> tuple[Found, str]:
    """Generate and train with the choices in use; return what came of it, and which implementation ran how often."""
    attnplug.use_choices(choices)
    try:
        with attnplug.record() as calls:
            llama.generate()
            found = llama.train()
    finally:
        attnplug.restore_choices()
    counted = Counter(call.impl for call in calls)
    return found, ", ".join(f"{impl} {times} times" for impl, times in counted.most_common())


def too_far(found: Found, reference: Found, exact: Found) -> list[str]:
    """Return which results are further from PyTorch's than rounding explains."""
    wrong = []
    for name in ("logits", "gradient"):
        given, expected, wide = (getattr(each, name).double() for each in (found, reference, exact))
        tolerance = ERRORS_APART * (expected - wide).abs().max()
        if not bool((given - expected).abs().max() <= tolerance):  # written so that a NaN is wrong too
            wrong.append(name)
    return wrong


def main(arguments: list[str] | None = None) -> int:
    """Return 0 if what was chosen computes what PyTorch's attention does, else 1."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cpu", help="where the model runs, such as cpu or cuda (default cpu)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    options = parser.parse_args(arguments)
    llama = Llama(options.device, getattr(torch, options.dtype))
    choices = tune(llama)
    reference, exact = llama.train(), llama.exact()
    found, counts = ran(choices, llama)
    ratios = {
        name: with_and_without(choices, lambda run=run: llama.seconds(run))[1]
        for name, run in (("generate", llama.generate), ("a step of training", llama.train))
    }
    wrong = too_far(found, reference, exact)
    print(choices, f"\nRan in one generate and one step of training: {counts}.", sep="\n")
    print(f"Logits and gradients: {f'WRONG: {wrong}' if wrong else 'as near PyTorch as rounding allows'}.")
    gains = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
    print(f"Tuned: {chosen(choices)}: {gains} times as fast as with PyTorch's default in the same run.")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
