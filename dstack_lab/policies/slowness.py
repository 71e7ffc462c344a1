"""What launches cost each other, learnt from how long they took and who ran beside them: no model of the GPU, no oracle."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from dstack_lab.contention import Contention
from dstack_lab.policies.base import Decision, GpuState, Launch

#: Launches that "alone, as predicted" counts for, of all services together and of each: estimates move off it against evidence.
PRIOR, PRIOR_EACH = 2.0, 10.0
#: Launches that estimates need, and the mean number of others beside them that `slowdown` needs.
ENOUGH, BESIDE = 50.0, 0.2


@dataclass(slots=True)
class _Seen:
    """A launch that has not ended."""

    key: tuple[str, float, int]  # service, since when, batch
    predicted_ms: float
    others_ms: float = 0.0  # others beside it, times how long


class SlownessWatch:
    """Fits ``took / predicted = a + slowdown · others`` to the launches seen, by least squares.

    `others` is the mean number of launches beside one while it ran, each weighted as `Contention` does: the longer is
    felt more. `a` is what predictions miss of a launch alone. Where launches always have as many others beside
    them the two cannot be told apart, and how long they take together is still right.
    """

    def __init__(self, exponent: float = Contention().exponent) -> None:
        self._exponent = exponent
        self._running: list[_Seen] = []  # oldest first
        self._now = 0.0
        self._sums = np.zeros(5)  # of 1, others, others², ratio, others · ratio
        self._own: dict[str, np.ndarray] = {}  # of 1, others, ratio, by service

    def look(self, state: GpuState) -> None:
        """Note the launches that have ended; to be called at the begin of every `decide`."""
        now = state.now_ms
        gone, self._now = now - self._now, now
        if gone > 0 and len(self._running) > 1:
            weights = [seen.predicted_ms**self._exponent for seen in self._running]
            total = sum(weights)
            for seen, weight in zip(self._running, weights, strict=True):
                seen.others_ms += gone * (total - weight) / weight
        left = Counter((one.service, one.since_ms, one.batch) for one in state.running)
        kept = []
        for seen in self._running:
            if left[seen.key] > 0:
                left[seen.key] -= 1
                kept.append(seen)
            elif now > (since := seen.key[1]):
                self._learn(seen.key[0], (now - since) / seen.predicted_ms, seen.others_ms / (now - since))
        self._running = kept

    def _learn(self, name: str, ratio: float, others: float) -> None:
        self._sums += (1, others, others * others, ratio, others * ratio)
        mine = self._own.setdefault(name, np.zeros(3))
        mine += (1, others, ratio)

    def launched(self, state: GpuState, decisions: Iterable[Decision]) -> None:
        """Note what begins now; to be called with what `decide` answers."""
        for one in decisions:
            if isinstance(one, Launch):
                predicted_ms = state[one.service].service_ms(one.batch, one.gpu_pct)
                self._running.append(_Seen((one.service, state.now_ms, one.batch), predicted_ms))

    def forget(self, part: float) -> None:
        """Let this part of what was seen fade."""
        self._sums *= 1 - part
        for mine in self._own.values():
            mine *= 1 - part

    @property
    def enough(self) -> bool:
        """Whether enough launches were seen."""
        return bool(self._sums[0] >= ENOUGH)

    @property
    def slowdown(self) -> float | None:
        """Of two equally long launches beside each other, less one; None as long as too few ran beside each other."""
        n, x, xx, y, xy = self._sums
        if not self.enough or x < BESIDE * n:
            return None
        n, y = n + PRIOR, y + PRIOR  # launches alone, as predicted
        return max(0.0, float((n * xy - x * y) / (n * xx - x * x)))

    def factors(self, slowdown: float) -> dict[str, float]:
        """Time alone over the predicted one of each service, if launches beside each other cost `slowdown`."""
        return {name: float((y + PRIOR_EACH) / (n + slowdown * x + PRIOR_EACH)) for name, (n, x, y) in self._own.items()}
