"""What this machine can do at best, measured in the same run: the rate of products, and of copies.

A share of a data sheet's peak says little about a kernel: the GPU may be throttled, shared, or cut down.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from attnplug.bench._clocks import Clock

_ENOUGH = 0.05
_LARGEST = 8192
_REPEATS = 5


@dataclass(frozen=True)
class Ceiling:
    """The best that a device did with one dtype.

    Attributes:
        device, dtype: as in a case.
        flops: operations a second of a product of two square matrices.
        bandwidth: bytes a second of a copy, each byte counted twice: read and written.
    """

    device: str
    dtype: str
    flops: float
    bandwidth: float

    def seconds(self, flops: float, moved: float) -> float:
        """Return the least time for so many operations and bytes moved: whichever takes longer."""
        return max(flops / self.flops, moved / self.bandwidth)


def measure_ceiling(device: str, dtype: str, clock: Clock) -> Ceiling:
    """Measure the rates; a second or two."""
    import torch

    return Ceiling(device, dtype, _matrix_rate(device, getattr(torch, dtype), clock), _bandwidth(device, clock))


def _matrix_rate(device: str, dtype: torch.dtype, clock: Clock) -> float:
    """Return operations a second of the largest product that takes little time; the best of several."""
    import torch

    best, size = 0.0, 512
    while size <= _LARGEST:
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        product = torch.empty_like(left)

        def multiply(left: torch.Tensor = left, right: torch.Tensor = right, out: torch.Tensor = product) -> None:
            torch.mm(left, right, out=out)

        seconds = clock.warm(multiply, 1)
        if seconds < _ENOUGH:
            seconds = min([seconds, *(clock.warm(multiply, 1) for _ in range(_REPEATS))])
        best = max(best, 2 * size**3 / seconds)
        if seconds > _ENOUGH:
            break
        size *= 2
    return best


def _bandwidth(device: str, clock: Clock) -> float:
    """Return bytes a second, read and written, of a copy that no cache holds."""
    import torch

    source = torch.zeros(clock.buffer_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    seconds = min(clock.warm(lambda: target.copy_(source), 1) for _ in range(_REPEATS))
    return 2 * source.nbytes / seconds
