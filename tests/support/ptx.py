"""Runs the assembly of an element-wise PTX block for one warp, so that it can be held against what it should compute.

Of PTX it knows what `attnplug_flash_triton.hopper.device` writes; an instruction that it does not know, a register that
was not written before, and a jump that the threads of a warp do not take together are errors.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

THREADS = 32
_LABEL = re.compile(r"^([A-Z]\w*):\s*")
_TINY = torch.finfo(torch.float32).tiny


def _flushed(x: Tensor) -> Tensor:
    return torch.where(x.abs() < _TINY, 0.0 * x, x)


def _any(x: Tensor, mask: str) -> Tensor:
    assert int(mask, 16) == 2**THREADS - 1
    return x.any().expand(THREADS)


INSTRUCTIONS: dict[str, Callable[..., Tensor]] = {
    "mov.f32": lambda x: x,
    "max.f32": torch.fmax,  # of a number and a NaN, the number
    "max.NaN.f32": torch.maximum,
    "sub.f32": torch.sub,
    "mul.f32": torch.mul,
    "ex2.approx.ftz.f32": lambda x: _flushed(torch.exp2(_flushed(x))),
    "rcp.approx.ftz.f32": lambda x: _flushed(1 / _flushed(x)),
    "setp.gt.s32": lambda x, y: x > y,
    "selp.f32": lambda x, y, where: torch.where(where, x, y),
    "setp.neu.f32": torch.ne,
    "setp.neu.or.f32": lambda x, y, other: torch.ne(x, y) | other,
    "vote.sync.any.pred": _any,
}


def run(assembly: str, outputs: int, inputs: list[Tensor]) -> list[Tensor]:
    """Return `$0` to `$(outputs - 1)`, given what follows them: float32 or int32, one for each thread."""
    body = re.fullmatch(r"\s*\{(.*)\}\s*", assembly, re.DOTALL)
    assert body is not None
    code, labels = [], {}
    for part in body[1].split(";"):
        line = part.strip()
        while found := _LABEL.match(line):
            assert found[1] not in labels
            labels[found[1]] = len(code)
            line = line[found.end() :]
        if line:
            code.append(line)
    registers: dict[str, Any] = {f"${outputs + number}": value for number, value in enumerate(inputs)}
    at = 0
    while at < len(code):
        guard, name, operands = _read(code[at])
        at += 1
        if name == ".reg":
            continue
        if name == "bra":
            if guard is None or _together(registers[guard.lstrip("!")]) is not guard.startswith("!"):
                assert labels[operands[0]] >= at
                at = labels[operands[0]]
            continue
        assert guard is None
        target, *given = operands
        registers[target] = INSTRUCTIONS[name](*(_value(each, registers) for each in given))
    return [registers[f"${number}"] for number in range(outputs)]


def _read(line: str) -> tuple[str | None, str, list[str]]:
    guard = None
    if line.startswith("@"):
        guard, line = line[1:].split(maxsplit=1)
    name, _, rest = line.partition(" ")
    return guard, name, [each.strip() for each in rest.split(",")]


def _together(predicate: Tensor) -> bool:
    assert bool(predicate.all()) == bool(predicate.any())
    return bool(predicate.any())


def _value(operand: str, registers: dict[str, Any]) -> Any:
    if operand.startswith("0f"):
        return torch.frombuffer(bytearray.fromhex(operand[2:])[::-1], dtype=torch.float32).expand(THREADS)
    if re.fullmatch(r"-?\d+", operand):
        return torch.tensor(int(operand), dtype=torch.int32).expand(THREADS)
    return operand if operand.startswith("0x") else registers[operand]
