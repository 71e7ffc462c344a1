"""What launches that run at the same time cost each other.

Two effects. On *disjoint shares* networks still share the memory, its caches and the path that kernels
are dispatched on: each takes a little longer. *Without a partition*, when the launches together could
use more than the whole GPU, their kernels take turns: a kernel waits for those of the others that do
not fit beside it. Neither effect is zero in a measurement; both have global constants only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dstack_lab.checks import non_negative, require
from dstack_lab.tables import ServiceTable

SHARINGS = ("turns", "proportional")


class Load(NamedTuple):
    """A running launch as the others feel it.

    `service_ms` is its time alone at the share it asked for, `knee_pct` what it can use of the GPU, at
    most that share.
    """

    table: ServiceTable
    batch: int
    gpu_pct: float
    service_ms: float
    knee_pct: float


@dataclass(frozen=True, slots=True)
class Contention:
    """How many times longer launches take beside each other than alone.

    With L_i the time alone, k_i the share a launch can use (its knee, at most what it asked for), D the
    sum of all k and A_i = k_i·L_i its work:

    * D <= 100: everything fits. ``stretch_i = 1 + slowdown · sum over others (L_j / L_i) ** exponent``:
      the launch with the longer kernels is felt more than it feels.
    * D > 100, sharing "turns": the part ``w_i = (D - 100) / (D - k_i)`` of what the others want does not
      fit beside launch i, which waits for that part of their work: it takes
      ``(A_i + w_i · sum of the others' A) / k_i``, times the slowdown above. Four launches that each fill
      the GPU take at least as long as all four in a row, and end together.
    * D > 100, sharing "proportional": each runs as if alone at k_i · 100 / D, and with the slowdown. The
      usual first guess, kept to show where it breaks: it promises that small shares are as efficient
      without a partition as with one.

    Parameters
    ----------
    slowdown : float
        Of two equally long launches on disjoint shares, 0 or more; 0 switches it off.
    exponent : float
        How unequally the longer and the shorter launch are slowed down, 0 or more.
    sharing : {"turns", "proportional"}
        What happens when the launches want more than the GPU.

    Notes
    -----
    The two constants minimise the absolute error over both sides of 750 pairs of four networks on
    disjoint shares of a V100 (solo times known): median error 2.3 points, of a constant 2.9, and 2.4
    for pairs with a network that was left out. Demand for memory bandwidth was tried in their place:
    measured DRAM use of the other side errs by 2.5 points, bytes counted from the kernels by 2.7.
    More than two launches were not measured pair by pair; their effects are added. Turns were checked
    with the published rates of four networks under default MPS: with the batches of that log the sum is
    11 % low, each within 20 %; proportional sharing is 2.7 times as high. With one image a batch the sum is
    24 % low, and the split wrong: light networks wait too long (alexnet 26.5 ms, measured 13.5), heavy ones
    not long enough (resnet50 30, measured 40), for how many kernels a network has is not known here. So a rule
    that learns batches from these times never begins to grow them, as it did on the GPU. Own formulation.
    """

    slowdown: float = 0.096
    exponent: float = 0.1
    sharing: str = "turns"

    def __post_init__(self) -> None:
        non_negative("slowdown", self.slowdown)
        non_negative("exponent", self.exponent)
        require(self.sharing in SHARINGS, "sharing", self.sharing, f"one of {SHARINGS}")

    def stretch(self, loads: Sequence[Load]) -> list[float]:
        """Service time beside the others over service time alone, 1 or more, of each running launch."""
        if len(loads) < 2:
            return [1.0] * len(loads)
        wanted = sum([load.knee_pct for load in loads])
        slow = self._slowdowns(loads)
        if wanted <= 100:
            return slow
        if self.sharing == "proportional":
            return [s * _at(load, load.knee_pct * 100 / wanted) / load.service_ms for s, load in zip(slow, loads, strict=True)]
        work = sum([load.knee_pct * load.service_ms for load in loads])
        stretched = []
        for load, s in zip(loads, slow, strict=True):
            part = (wanted - 100) / (wanted - load.knee_pct)
            mine = load.knee_pct * load.service_ms
            stretched.append((1 + part * (work - mine) / mine) * s)
        return stretched

    def _slowdowns(self, loads: Sequence[Load]) -> list[float]:
        weights = [load.service_ms**self.exponent for load in loads]
        total = sum(weights)
        return [1 + self.slowdown * (total - weight) / weight for weight in weights]


def _at(load: Load, gpu_pct: float) -> float:
    """Service time [ms] at a share that may be below 1 %, where time is in inverse proportion to it."""
    gpu_pct = min(gpu_pct, load.gpu_pct)
    return load.table.at(load.batch, gpu_pct) if gpu_pct >= 1 else load.table.at(load.batch, 1) / gpu_pct
