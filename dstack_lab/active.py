"""Which points to measure next, so that a dozen tell what a full grid would.

Start at the corners and a few points that fill the space; then, one at a time, measure where the
fitted model expects to lose most doubt about the points that matter: those around the knees, at full
GPU%, and near the operating point. Nothing here knows a device: measuring is a function passed in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from dstack_lab.checks import count, percent, positive, require
from dstack_lab.gpu_model import GpuModel, fit
from dstack_lab.kriging import doubt_removed
from dstack_lab.profiles import Profile
from dstack_lab.provenance import Provenance
from dstack_lab.surface import Floats, Prior

#: Candidates beyond this many batches and shares are thinned: neighbours tell the same.
_MOST_BATCHES, _MOST_SHARES = 20, 20

#: Weight of a point around a knee, of a rival for the operating point, and of one too slow for the SLO; others weigh 1.
_NEAR_KNEE, _NEAR_BEST, _SLOW = 1.2, 2.0, 0.2

#: Room between the measured shares that doubles a point's weight, as a standard deviation [log units].
_WIDE = 0.05

#: A point that promises this part of the best efficacy may turn out to be the operating point.
_RIVAL = 0.6

#: The last points go to what looks like the operating point, so that a plan rests on a measured time.
_LAST = 2

_ORIGIN = Provenance("measured", "as the caller measured", "as the caller measured")


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """What was measured, and how much it tells.

    Parameters
    ----------
    table : pandas.DataFrame
        Columns ``batch``, ``gpu_pct``, ``service_ms`` (NaN where measuring failed) and ``reason``
        (``"start"``, ``"doubt"`` or ``"operating point"``), in the order of measuring.
    model : GpuModel
        Fitted to the table.
    knees : pandas.DataFrame
        One row per batch: ``batch``, ``knee_pct``, ``low_pct``, ``high_pct``, ``kind``, over the
        shares offered (tolerance rule, 90 % interval).
    operating_point : tuple of (int, float) or None
        Batch and GPU% of largest efficacy with L <= SLO / 2; None without an SLO, or if none is feasible.
    doubt : float
        Median half-width of the 90 % band over the grid, relative (0.05: within 5 %).
    """

    table: pd.DataFrame
    model: GpuModel
    knees: pd.DataFrame
    operating_point: tuple[int, float] | None
    doubt: float

    def __str__(self) -> str:
        middle = self.knees.iloc[len(self.knees) // 2]
        knee = self.model.knee(float(middle["batch"]), shares=self._shares)
        return f"{len(self.table)} points; service time to about {100 * self.doubt:.0f} %; batch {middle['batch']}: {knee}"

    @property
    def _shares(self) -> Floats:
        return np.asarray(self.knees.attrs["shares"], dtype=np.float64)


def choose_points(
    measure: Callable[[int, float], float],
    batches: Sequence[int],
    shares: Sequence[float],
    budget: int = 12,
    slo_ms: float | None = None,
    prior: Prior | None = None,
) -> Choice:
    """Measure at most `budget` points of the grid batches x shares, each chosen from those before.

    Parameters
    ----------
    measure : callable
        ``measure(batch, gpu_pct) -> service_ms``; NaN if the point cannot be measured (out of
        memory): it counts, and is not asked again.
    batches, shares : sequences
        What may be measured: integers from 1, GPU% from 1 to 100.
    budget : int
        2 or more; with a budget of the whole grid or more, the whole grid is measured.
    slo_ms : float, optional
        Latency objective [ms]: points slower than it matter less, those near the operating point more.
    prior : callable, optional
        As for `gpu_model.fit`.

    Raises
    ------
    ValueError
        For an argument out of range, a measurement that is not a time, or fewer than 2 points that
        could be measured.
    """
    batch_list = sorted({count("batch", b) for b in batches})
    require(len(batch_list) > 0, "batches", batch_list, "one or more")
    share_list = sorted({percent("gpu_pct", g) for g in shares})
    require(len(share_list) > 0, "shares", share_list, "one or more")
    count("budget", budget, least=2)
    if slo_ms is not None:
        positive("slo_ms", slo_ms)
    all_batches, all_shares = np.array(batch_list, dtype=np.float64), np.array(share_list)
    few = _spaced(all_batches, _MOST_BATCHES), _spaced(all_shares, _MOST_SHARES)
    grid = few if budget < all_batches.size * all_shares.size else (all_batches, all_shares)
    b, g = (a.ravel() for a in np.meshgrid(*grid, indexing="ij"))
    rows: list[tuple[int, float, float, str]] = []
    left = np.ones(len(b), dtype=bool)

    def look(which: int, reason: str) -> None:
        left[which] = False
        ms = float(measure(int(b[which]), float(g[which])))
        require(np.isnan(ms) or (np.isfinite(ms) and ms > 0), "measure(batch, gpu_pct)", ms, "finite ms above 0, or NaN")
        rows.append((int(b[which]), float(g[which]), ms, reason))

    for which in _start(b, g, min(budget, 6)) if budget < len(b) else range(len(b)):
        look(which, "start")
    while left.any() and len(rows) < budget:
        good = [row for row in rows if not np.isnan(row[2])]
        if len(good) < 2:
            look(int(np.flatnonzero(left)[0]), "start")
            continue
        model = _fitted(good, prior)
        point = _operating_point(model, grid[0], grid[1], slo_ms)
        at_point = left & (b == point[0]) & (g == point[1]) if point else np.zeros_like(left)
        if at_point.any() and budget - len(rows) <= _LAST:
            look(int(np.flatnonzero(at_point)[0]), "operating point")
        else:
            value = doubt_removed(b, g, ~left, _weights(model, b, g, slo_ms, point))
            look(int(np.argmax(np.where(left, value, -1.0))), "doubt")
    good = [row for row in rows if not np.isnan(row[2])]
    require(len(good) >= 2, "points that could be measured", len(good), "2 or more")
    model = _fitted(good, prior)
    table = pd.DataFrame(rows, columns=["batch", "gpu_pct", "service_ms", "reason"])
    low, high = model.band(b, g)
    point = _operating_point(model, all_batches, all_shares, slo_ms)
    return Choice(table, model, _knees(model, batch_list, all_shares), point, float(np.median(np.sqrt(high / low) - 1)))


def _start(b: Floats, g: Floats, most: int) -> list[int]:
    """Indices of the corners, then of points that fill the space between them, in logs."""
    x, y = _unit(b), _unit(g)
    chosen: list[int] = []
    for corner in ((0, 1), (1, 0), (0, 0), (1, 1)):
        at = int(np.argmin(np.hypot(x - corner[0], y - corner[1])))
        if at not in chosen:
            chosen.append(at)
    while len(chosen) < min(most, len(b)):
        away = np.min(np.hypot(x[:, None] - x[chosen], y[:, None] - y[chosen]), axis=1)
        chosen.append(int(np.argmax(away)))
    return chosen[:most]


def _weights(model: GpuModel, b: Floats, g: Floats, slo_ms: float | None, point: tuple[int, float] | None) -> Floats:
    """How much doubt about each point matters, shape (n,)."""
    weights = np.ones(len(b))
    shares = np.unique(g)
    for batch in np.unique(b):
        knee = model.knee(batch, shares=shares)
        here = b == batch
        weights[here & (((g >= knee.low) & (g <= knee.high)) | (g == shares[-1]))] = _NEAR_KNEE
    below, above = model.room(b, g)
    weights *= 1 + ((below + above) / _WIDE) ** 2 / 12
    if slo_ms is not None:
        ms = np.asarray(model.predict(b, g))
        weights[ms > slo_ms] *= _SLOW
        if point is not None:
            efficacy = np.where(ms <= 0.6 * slo_ms, b / (ms**2 * g), 0.0)
            weights[efficacy >= _RIVAL * efficacy[(b == point[0]) & (g == point[1])]] = _NEAR_BEST
    return weights


def _operating_point(model: GpuModel, batches: Floats, shares: Floats, slo_ms: float | None) -> tuple[int, float] | None:
    if slo_ms is None:
        return None
    ms = np.asarray(model.predict(batches[:, None], shares))
    efficacy = np.where(ms <= slo_ms / 2, batches[:, None] / (ms**2 * shares), 0.0)
    i, j = np.unravel_index(int(np.argmax(efficacy)), ms.shape)
    return (int(batches[i]), float(shares[j])) if efficacy[i, j] > 0 else None


def _knees(model: GpuModel, batches: list[int], shares: Floats) -> pd.DataFrame:
    found = [model.knee(batch, shares=shares) for batch in batches]
    table = pd.DataFrame(
        [(batch, k.pct, k.low, k.high, k.kind) for batch, k in zip(batches, found, strict=True)],
        columns=["batch", "knee_pct", "low_pct", "high_pct", "kind"],
    )
    table.attrs["shares"] = shares.tolist()
    return table


def _fitted(rows: list[tuple[int, float, float, str]], prior: Prior | None) -> GpuModel:
    table = pd.DataFrame([row[:3] for row in rows], columns=["batch", "gpu_pct", "service_ms"]).assign(model="measured")
    return fit(Profile(table, _ORIGIN, strict=False), "measured", prior)


def _spaced(values: Floats, most: int) -> Floats:
    """At most `most` of the values, evenly spread in logs, both ends included."""
    if len(values) <= most:
        return values
    even = np.geomspace(values[0], values[-1], most)
    return np.unique(values[np.abs(np.log(values[:, None] / even)).argmin(axis=0)])


def _unit(values: Floats) -> Floats:
    """Logs scaled to 0-1."""
    logs = np.log(values)
    width = np.ptp(logs)
    return np.asarray((logs - logs.min()) / (width if width > 0 else 1.0))
