"""Arrival processes: when requests come, sampled from a numpy Generator.

All are open-loop: requests come at their own times, however slow the GPU is. Every process is an
event stream of unit rate, stretched by the inverse of its cumulative rate; a seed therefore fixes
the same stream for every policy that is compared.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dstack_lab.checks import positive, require

Times = NDArray[np.float64]


@runtime_checkable
class Arrivals(Protocol):
    """What a `Service` needs to know of its requests."""

    @property
    def rate_rps(self) -> float:
        """Long-run mean rate [requests/s]."""

    def sample(self, duration_ms: float, rng: np.random.Generator) -> Times:
        """Return the sorted arrival times in [0, duration_ms) [ms]."""


@dataclass(frozen=True, slots=True)
class Poisson:
    """Memoryless arrivals: independent exponential gaps.

    Parameters
    ----------
    rate_rps : float
        Mean rate [requests/s], finite and above 0.
    """

    rate_rps: float

    def __post_init__(self) -> None:
        positive("rate_rps", self.rate_rps)

    def sample(self, duration_ms: float, rng: np.random.Generator) -> Times:
        """Return the sorted arrival times in [0, duration_ms) [ms]."""
        return _renewal(duration_ms, 1000.0 / self.rate_rps, lambda n: rng.standard_exponential(n))


@dataclass(frozen=True, slots=True)
class Gamma:
    """Gamma-distributed gaps: `cv` above 1 comes in bursts, below 1 more evenly than Poisson.

    Parameters
    ----------
    rate_rps : float
        Mean rate [requests/s].
    cv : float
        Coefficient of variation of the gaps (standard deviation / mean), above 0; 1 is Poisson.
    """

    rate_rps: float
    cv: float

    def __post_init__(self) -> None:
        positive("rate_rps", self.rate_rps)
        positive("cv", self.cv)

    def sample(self, duration_ms: float, rng: np.random.Generator) -> Times:
        """Return the sorted arrival times in [0, duration_ms) [ms]."""
        shape = 1 / self.cv**2
        return _renewal(duration_ms, 1000.0 / self.rate_rps, lambda n: rng.standard_gamma(shape, n) / shape)


@dataclass(frozen=True, slots=True)
class Deterministic:
    """Evenly spaced arrivals, the first after one gap.

    Parameters
    ----------
    rate_rps : float
        Rate [requests/s].
    """

    rate_rps: float

    def __post_init__(self) -> None:
        positive("rate_rps", self.rate_rps)

    def sample(self, duration_ms: float, rng: np.random.Generator) -> Times:
        """Return the sorted arrival times in [0, duration_ms) [ms]; `rng` is not used."""
        positive("duration_ms", duration_ms)
        times = np.arange(1, int(duration_ms * self.rate_rps / 1000) + 2) * (1000.0 / self.rate_rps)
        return np.asarray(times[times < duration_ms], dtype=np.float64)


@dataclass(frozen=True, slots=True)
class Steps:
    """Poisson arrivals whose rate changes at given times.

    Parameters
    ----------
    steps : tuple of (start_ms, rate_rps)
        Ascending start times, the first 0; each rate holds until the next start, the last for ever.
        A rate may be 0 (the service is silent) but not all of them.

    Examples
    --------
    A rate that doubles for 5 s, then halves: ``Steps(((0, 100), (5_000, 200), (10_000, 50)))``.
    """

    steps: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        table = np.asarray(self.steps, dtype=float)
        require(table.ndim == 2 and table.shape[1:] == (2,), "steps", self.steps, "pairs of (start_ms, rate_rps)")
        start, rate = table.T
        require(start[0] == 0 and bool((np.diff(start) > 0).all()), "steps start_ms", start.tolist(), "ascending, the first 0")
        finite = bool(np.isfinite(table).all() and (rate >= 0).all() and rate.any())
        require(finite, "steps rate_rps", rate.tolist(), "finite, 0 or more, not all 0")
        object.__setattr__(self, "steps", tuple((float(s), float(r)) for s, r in table))

    @property
    def rate_rps(self) -> float:
        """Highest rate of any step [requests/s]: what a plan has to be ready for."""
        return max(rate for _, rate in self.steps)

    def sample(self, duration_ms: float, rng: np.random.Generator) -> Times:
        """Return the sorted arrival times in [0, duration_ms) [ms]."""
        positive("duration_ms", duration_ms)
        start, rate = np.asarray([s for s in self.steps if s[0] < duration_ms]).T
        edge = np.append(start, duration_ms)
        expected = np.concatenate(([0.0], np.cumsum(rate * np.diff(edge)) / 1000))
        unit = _renewal(expected[-1], 1.0, lambda n: rng.standard_exponential(n)) if expected[-1] > 0 else np.empty(0)
        return np.asarray(np.interp(unit, expected, edge), dtype=np.float64)


@dataclass(frozen=True, slots=True)
class Drift:
    """Poisson arrivals whose rate moves in straight lines between given points.

    Parameters
    ----------
    points : tuple of (at_ms, rate_rps)
        Ascending times, the first 0, 2 or more; the last rate holds from then on. A rate may be 0, but not all of them.

    Examples
    --------
    From 100 to 300 requests/s within a minute, then back: ``Drift(((0, 100), (60_000, 300), (120_000, 100)))``.
    """

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        table = np.asarray(self.points, dtype=float)
        good = table.ndim == 2 and table.shape[1:] == (2,) and len(table) > 1
        require(good, "points", self.points, "2 or more pairs of (at_ms, rate_rps)")
        at, rate = table.T
        require(at[0] == 0 and bool((np.diff(at) > 0).all()), "points at_ms", at.tolist(), "ascending, the first 0")
        finite = bool(np.isfinite(table).all() and (rate >= 0).all() and rate.any())
        require(finite, "points rate_rps", rate.tolist(), "finite, 0 or more, not all 0")
        object.__setattr__(self, "points", tuple((float(t), float(r)) for t, r in table))

    @property
    def rate_rps(self) -> float:
        """Highest rate at any time [requests/s]: what a plan has to be ready for."""
        return max(rate for _, rate in self.points)

    def sample(self, duration_ms: float, rng: np.random.Generator) -> Times:
        """Return the sorted arrival times in [0, duration_ms) [ms]."""
        positive("duration_ms", duration_ms)
        at, rate = np.asarray(self.points).T
        if duration_ms > at[-1]:
            at, rate = np.append(at, duration_ms), np.append(rate, rate[-1])
        gap, slope = np.diff(at), np.diff(rate) / np.diff(at)
        expected = np.concatenate(([0.0], np.cumsum((rate[1:] + rate[:-1]) / 2 * gap) / 1000))
        unit = _renewal(expected[-1], 1.0, lambda n: rng.standard_exponential(n))
        k = np.minimum(np.searchsorted(expected, unit, side="right") - 1, len(gap) - 1)
        area = 2000 * (unit - expected[k])  # of rate · x + slope · x² / 2 = requests since the point, in a form stable at slope 0
        root = np.sqrt(np.maximum(rate[k] ** 2 + slope[k] * area, 0.0))
        times = at[k] + area / np.maximum(rate[k] + root, 1e-300)
        return np.asarray(times[times < duration_ms], dtype=np.float64)


@dataclass(frozen=True, slots=True, eq=False)
class Replay:
    """Recorded arrivals, played back as they were.

    Parameters
    ----------
    times_ms : array_like, shape (n,)
        Arrival times [ms], finite, 0 or more, ascending; n is 1 or more.
    """

    times_ms: Times

    def __post_init__(self) -> None:
        times = np.asarray(self.times_ms, dtype=float)
        require(times.ndim == 1 and times.size > 0, "times_ms shape", times.shape, "(n,) with n of 1 or more")
        good = bool(np.isfinite(times).all() and times[0] >= 0 and (np.diff(times) >= 0).all())
        require(good, "times_ms", times[:5].tolist(), "finite, 0 or more and ascending")
        object.__setattr__(self, "times_ms", times)

    @classmethod
    def from_csv(cls, path: str | os.PathLike[str], column: str = "arrival_ms") -> Replay:
        """Read the column `column` [ms] of a CSV file.

        Raises
        ------
        ValueError
            If the file lacks the column or holds no ascending times.
        """
        table = pd.read_csv(Path(path))
        require(column in table.columns, "column", column, f"one of {list(table.columns)}")
        return cls(pd.to_numeric(table[column], errors="coerce").to_numpy(dtype=float))

    @property
    def rate_rps(self) -> float:
        """Mean rate up to the last arrival [requests/s]."""
        return 1000.0 * self.times_ms.size / max(float(self.times_ms[-1]), 1e-9)

    def sample(self, duration_ms: float, rng: np.random.Generator) -> Times:
        """Return the recorded times below `duration_ms` [ms]; `rng` is not used."""
        positive("duration_ms", duration_ms)
        return np.asarray(self.times_ms[self.times_ms < duration_ms], dtype=np.float64)


def _renewal(duration: float, mean_gap: float, gaps: Callable[[int], Times]) -> Times:
    """Sum gaps of unit mean until `duration` is passed, drawn in blocks: a longer run begins like a shorter one."""
    positive("duration_ms", duration)
    block = 1024
    parts: list[Times] = []
    last = 0.0
    while last < duration:
        times = last + np.cumsum(gaps(block)) * mean_gap
        parts.append(times)
        last = float(times[-1])
        block = max(1024, int(1.1 * (duration - last) / mean_gap) + 64) if last < duration else block
    times = np.concatenate(parts)
    return times[times < duration]
