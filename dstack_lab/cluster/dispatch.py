"""Which replica serves a request: decided when it arrives, from what was planned and sent so far.

A dispatcher sees all arrivals of one service at once, but gives each its replica as if it knew no later one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from dstack_lab.checks import positive, require

Array = NDArray[np.float64]
Indices = NDArray[np.int64]


@runtime_checkable
class Dispatch(Protocol):
    """What `simulate_cluster` asks of a dispatcher."""

    def assign(self, times_ms: Array, rates_rps: Sequence[float], full_rps: Sequence[float], rng: np.random.Generator) -> Indices:
        """Return the replica of each request of one service.

        Parameters
        ----------
        times_ms : numpy.ndarray, shape (n,)
            Arrival times, ascending [ms].
        rates_rps : sequence of float
            Planned rate of each replica [requests/s].
        full_rps : sequence of float
            Rate of each replica at which its GPU, in its planned mix, would be full [requests/s].
        rng : numpy.random.Generator
            Of this service, apart from the one that its arrivals come from.

        Returns
        -------
        numpy.ndarray of int, shape (n,)
        """


@dataclass(frozen=True, slots=True)
class RoundRobin:
    """Smooth weighted round robin: in proportion to the planned rates, and as evenly in time as can be; nothing is drawn.

    Every request gives each replica its part of a credit; the one with the most serves it and pays 1 (the rule
    of the nginx web server). At no time has a replica of k received more than its part plus 1 - 1/k requests.
    """

    def assign(self, times_ms: Array, rates_rps: Sequence[float], full_rps: Sequence[float], rng: np.random.Generator) -> Indices:
        """Return the replica of each request."""
        parts = _parts(rates_rps)
        credit = [0.0] * len(parts)
        chosen = np.empty(len(times_ms), dtype=np.int64)
        for i in range(len(times_ms)):
            credit = [c + p for c, p in zip(credit, parts, strict=True)]
            # parts such as 1/60 are no exact floats: a tie stays one, and goes to the first
            most = max(credit) - 1e-9
            best = next(k for k, c in enumerate(credit) if c >= most)
            credit[best] -= 1.0
            chosen[i] = best
        return chosen


@dataclass(frozen=True, slots=True)
class Random:
    """Each request on its own to a replica drawn by the planned rates: Poisson arrivals stay Poisson at every replica."""

    def assign(self, times_ms: Array, rates_rps: Sequence[float], full_rps: Sequence[float], rng: np.random.Generator) -> Indices:
        """Return the replica of each request."""
        edges = np.cumsum(_parts(rates_rps))[:-1]
        return np.searchsorted(edges, rng.random(len(times_ms)), side="right").astype(np.int64)


@dataclass(frozen=True, slots=True)
class LeastWork:
    """To the replica with the least predicted work; among equals to the one furthest below its planned part.

    An approximation: it does not see the GPUs. Each replica is taken for a queue that drains steadily at the
    rate at which its GPU, in its planned mix, would be full; that forgets an idle time, which a round robin does
    not, but knows nothing of batches, windows or the other services' bursts.
    """

    def assign(self, times_ms: Array, rates_rps: Sequence[float], full_rps: Sequence[float], rng: np.random.Generator) -> Indices:
        """Return the replica of each request."""
        parts = _parts(rates_rps)
        cost = [1000 / positive("full_rps", rate) for rate in full_rps]
        require(len(cost) == len(parts), "full_rps", full_rps, "one for each replica")
        clear, sent = [0.0] * len(parts), [0] * len(parts)  # when the work of each would be done [ms]
        chosen = np.empty(len(times_ms), dtype=np.int64)
        each = range(len(parts))
        for i, now in enumerate(times_ms.tolist()):
            best = min(each, key=lambda k: (round(max(clear[k] - now, 0.0), 6), round((sent[k] + 1) / parts[k], 6), k))
            clear[best] = max(clear[best], now) + cost[best]
            sent[best] += 1
            chosen[i] = best
        return chosen


def _parts(rates_rps: Sequence[float]) -> list[float]:
    require(len(rates_rps) > 0, "rates_rps", rates_rps, "1 or more")
    rates = [positive("rates_rps", rate) for rate in rates_rps]
    whole = sum(rates)
    return [rate / whole for rate in rates]
