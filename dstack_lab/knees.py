"""Knees: the share of a GPU beyond which more of it hardly helps, by five rules.

Rules differ by a factor of two on the same curve, so a knee always names its rule. All rules take
whole tables at once: shares ascending, service times with the share on the last axis.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dstack_lab.checks import positive, require

Floats = NDArray[np.float64]

#: "Within 5 % of the best", and a curve that changes by less over its whole range is flat.
TOLERANCE = 0.05

#: A step is worth its GPU% while throughput rises by this much per 10 points of share.
WORTH = 0.05

KINDS = ("knee", "none", "flat")


@dataclass(frozen=True, slots=True)
class Knee:
    """A knee with its rule and how far off it may be.

    Parameters
    ----------
    pct : float
        Knee [GPU%]; NaN if no share satisfies the rule (``capacity`` with a tight SLO) or none can be known.
    low, high : float
        Interval that holds the knee, as far as the model knows [GPU%].
    rule : str
        One of `RULES`.
    kind : {"knee", "none", "flat"}
        ``"none"``: no share short of the largest will do (the network scales to 100 %).
        ``"flat"``: service time changes by less than 5 % over all shares (launch-bound).

    Raises
    ------
    ValueError
        If the interval does not hold the knee, or a name is unknown.
    """

    pct: float
    low: float
    high: float
    rule: str = "tolerance"
    kind: str = "knee"

    def __post_init__(self) -> None:
        _require_rule(self.rule)
        require(self.kind in KINDS, "kind", self.kind, f"one of {', '.join(KINDS)}")
        if np.isnan(self.pct):
            require(self.kind == "none", "kind", self.kind, "'none' where pct is NaN")
            return
        require(1 <= self.low <= self.pct <= self.high <= 100, "(low, pct, high)", self._triple, "ascending, from 1 to 100")

    @property
    def _triple(self) -> tuple[float, float, float]:
        return (self.low, self.pct, self.high)

    def __str__(self) -> str:
        if np.isnan(self.pct):
            return "no knee: no share meets the SLO" if self.rule == "capacity" else "no knee known: the share was never varied"
        spread = "" if self.low == self.high else f" ({self.low:.0f}-{self.high:.0f})"
        if self.kind == "flat":
            return f"no knee: flat (launch-bound), {self.pct:.0f} % is enough{spread}"
        if self.kind == "none":
            return f"no knee: scales to {self.pct:.0f} %{spread}"
        return f"knee {self.pct:.0f} %{spread}"


def knee_pct(
    shares: ArrayLike,
    service_ms: ArrayLike,
    rule: str = "tolerance",
    *,
    batch: ArrayLike = 1,
    slo_ms: float | None = None,
) -> Floats:
    """Knee of every curve at once.

    Parameters
    ----------
    shares : array of shape (n,)
        GPU%, ascending, from 1 to 100.
    service_ms : array of shape (..., n)
        Service time of a batch at each share [ms], above 0.
    rule : {"tolerance", "chord", "marginal", "efficacy", "capacity"}
        See `RULES`; each function's docstring defines it.
    batch : array that broadcasts with shape (...)
        Batch of each curve. No rule's choice depends on it within one curve (efficacy and area
        scale with it); it is checked and kept so that callers can pass whole tables.
    slo_ms : float, optional
        Latency objective [ms]; needed by ``capacity`` only.

    Returns
    -------
    array of shape (...)
        Knee [GPU%], one of `shares`; NaN where no share satisfies the rule.

    Raises
    ------
    ValueError
        For an unknown rule, shares that do not ascend, or times that are not above 0.
    """
    _require_rule(rule)
    grid, curves = _checked(shares, service_ms)
    require(bool(np.all(np.asarray(batch) >= 1)), "batch", np.min(batch), "1 or more")
    if rule == "capacity":
        require(slo_ms is not None, "slo_ms", slo_ms, "given for the rule 'capacity'")
        return capacity(grid, curves, positive("slo_ms", slo_ms))
    return RULES[rule](grid, curves)


def kind_of(shares: ArrayLike, service_ms: ArrayLike, pct: float) -> str:
    """Say whether a curve has a knee at all: one of `KINDS` for a curve of shape (n,) and its knee `pct`."""
    grid, curve = _checked(shares, service_ms)
    if np.isnan(pct):
        return "none"
    if curve.max() <= (1 + TOLERANCE) * curve.min():
        return "flat"
    return "none" if pct >= grid[-1] else "knee"


def tolerance(shares: Floats, service_ms: Floats) -> Floats:
    """Smallest share whose service time is within 5 % of the curve's best."""
    good = service_ms <= (1 + TOLERANCE) * service_ms.min(axis=-1, keepdims=True)
    return _at(shares, good.argmax(axis=-1))


def chord(shares: Floats, service_ms: Floats) -> Floats:
    """Share where the curve lies furthest below the line that joins its two ends."""
    if len(shares) == 1:
        return _at(shares, np.zeros(service_ms.shape[:-1], dtype=np.intp))
    first, last = service_ms[..., :1], service_ms[..., -1:]
    line = first + (last - first) * (shares - shares[0]) / (shares[-1] - shares[0])
    depth = line - service_ms
    # rounding must not make an end of a straight line the winner
    depth[np.abs(depth) < 1e-9 * np.abs(first)] = 0.0
    return _at(shares, depth.argmax(axis=-1))


def marginal(shares: Floats, service_ms: Floats) -> Floats:
    """Share reached by the last step that still raises throughput by 5 % per 10 points of GPU%."""
    gain = -np.diff(np.log(service_ms), axis=-1)
    worth = gain >= np.log1p(WORTH) * np.diff(shares) / 10 * (1 - 1e-9)
    steps = worth.shape[-1]
    last = np.where(worth.any(axis=-1), steps - worth[..., ::-1].argmax(axis=-1), 0) if steps else np.zeros(worth.shape[:-1])
    return _at(shares, np.asarray(last, dtype=np.intp))


def efficacy(shares: Floats, service_ms: Floats) -> Floats:
    """Share with the largest b / (L^2 g): throughput per latency and GPU%."""
    return _at(shares, _first_least(2 * np.log(service_ms) + np.log(shares)))


def capacity(shares: Floats, service_ms: Floats, slo_ms: float) -> Floats:
    """Share with the smallest area g L / b among those with L <= SLO / 2; NaN where there is none.

    Half, because a request that just misses a launch is served by the next one.
    """
    feasible = service_ms <= slo_ms / 2
    area = np.where(feasible, np.log(service_ms) + np.log(shares), np.inf)
    return np.where(feasible.any(axis=-1), _at(shares, _first_least(area)), np.nan)


RULES: dict[str, Callable[..., Floats]] = {
    "tolerance": tolerance,
    "chord": chord,
    "marginal": marginal,
    "efficacy": efficacy,
    "capacity": capacity,
}


def _first_least(log_cost: Floats) -> NDArray[np.intp]:
    """Index of the least cost; among equals (to rounding) the smallest share."""
    return np.asarray((log_cost <= log_cost.min(axis=-1, keepdims=True) + 1e-9).argmax(axis=-1))


def _at(shares: Floats, index: NDArray[np.intp]) -> Floats:
    return np.asarray(shares[index], dtype=np.float64)


def _require_rule(rule: str) -> None:
    require(rule in RULES, "rule", rule, f"one of {', '.join(RULES)}")


def _checked(shares: ArrayLike, service_ms: ArrayLike) -> tuple[Floats, Floats]:
    grid, curves = np.asarray(shares, dtype=np.float64), np.asarray(service_ms, dtype=np.float64)
    ascending = grid.ndim == 1 and len(grid) > 0 and bool(np.all(np.diff(grid) > 0)) and grid[0] >= 1 and grid[-1] <= 100
    require(ascending, "shares", grid.tolist(), "one or more GPU% from 1 to 100, ascending")
    require(curves.shape[-1:] == grid.shape, "service_ms shape", curves.shape, f"(..., {len(grid)}), one time per share")
    good = bool(np.all(np.isfinite(curves) & (curves > 0)))
    require(good, "service_ms", None if good else curves[~(curves > 0) | ~np.isfinite(curves)][0], "finite and above 0")
    return grid, curves
