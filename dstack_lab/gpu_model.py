"""The GPU% model: a few measured points -> service time at any batch and share, and the knee.

A mixture of kernels (`surface`) is the backbone, a Gaussian process on what it leaves over
(`kriging`) the correction; both are read onto one table, made monotone, and interpolated in logs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit

from dstack_lab import knees
from dstack_lab.brackets import bracket
from dstack_lab.checks import require
from dstack_lab.knees import Knee
from dstack_lab.kriging import Correction, correct
from dstack_lab.monotone import MonotoneTable, straighten, tightened
from dstack_lab.profiles import Profile
from dstack_lab.surface import Floats, Mixture, Prior, fit_mixture, judge_mixture

_SAMPLES = 256

#: Half of the noise, up to 1.5 %, is the curve's own roughness and not the clock's; knee intervals allow for it.
_ROUGH, _ROUGHEST = 0.5, 0.015

#: Of a service time [ms]. Below a nanosecond, processors' linear algebra disagrees, and a plan must be the same on all.
DECIMALS = 6


@dataclass(frozen=True, slots=True, eq=False)
class GpuModel:
    """Service time of one network at any batch and GPU%; build it with `fit`.

    Parameters
    ----------
    model : str
        Name of the network.
    error : float
        Median absolute error relative to the points it was fitted to (0.02 is 2 %).
    held_out_error : float
        The same for points that were left out of the fit in turn: what to expect elsewhere.
        NaN where there were too few points to leave any out.
    notes : tuple of str
        What a reader must know: a batch or share that was never varied.
    """

    model: str
    error: float
    held_out_error: float
    _table: MonotoneTable = field(repr=False)
    _correction: Correction = field(repr=False)
    _knows_shares: bool = field(default=True, repr=False)
    notes: tuple[str, ...] = ()

    def predict(self, batch: ArrayLike, gpu_pct: ArrayLike) -> float | Floats:
        """Service time [ms]: never shorter for a larger batch, never longer with more GPU%.

        Parameters
        ----------
        batch : float or array
            Batch, 1 or more; may go beyond what was measured.
        gpu_pct : float or array
            GPU%, 1 to 100; broadcasts with `batch`.

        Returns
        -------
        float or array
            A float if both are scalars, else the broadcast shape; to the nanosecond.

        Raises
        ------
        ValueError
            If a batch is below 1 or a share outside 1 to 100.
        """
        ms = np.exp(self._table.log(*_checked(batch, gpu_pct))).round(DECIMALS)
        return float(ms) if ms.ndim == 0 else ms

    def band(self, batch: ArrayLike, gpu_pct: ArrayLike, level: float = 0.9) -> tuple[float, float] | tuple[Floats, Floats]:
        """Interval that should hold a new measurement with probability `level`.

        Parameters
        ----------
        batch, gpu_pct : float or array
            As for `predict`.
        level : float
            Probability, above 0 and below 1.

        Returns
        -------
        (low_ms, high_ms)
            Each in the form of `predict`'s result, around it.

        Raises
        ------
        ValueError
            As `predict`, or if `level` is out of range.
        """
        require(0 < level < 1, "level", level, "above 0 and below 1")
        b, g = _checked(batch, gpu_pct)
        spread = self._correction.spread(b.ravel(), g.ravel()).reshape(b.shape)
        # few points say little about their own spread, which Student's t makes up for
        wide = stdtrit(max(3, len(self._correction.at) // 2), (1 + level) / 2)
        below, above = self.room(b, g)
        half = wide * np.sqrt(spread**2 + self._correction.noise**2 + (below + above) ** 2 / 12)
        middle = self._table.log(b, g)
        low, high = np.exp(middle - half), np.exp(middle + half)
        return (float(low), float(high)) if low.ndim == 0 else (low, high)

    def knee_pct(
        self, batch: float, rule: str = "tolerance", shares: ArrayLike | None = None, slo_ms: float | None = None
    ) -> float:
        """Knee at one batch [GPU%], NaN if the share was never varied; see `knee`, which also says how sure it is."""
        grid = self._grid(shares)
        pct = float(knees.knee_pct(grid, self.predict(batch, grid), rule, batch=batch, slo_ms=slo_ms))
        return pct if self._knows_shares else float("nan")

    def knee(
        self,
        batch: float,
        rule: str = "tolerance",
        shares: ArrayLike | None = None,
        slo_ms: float | None = None,
        level: float = 0.9,
    ) -> Knee:
        """Knee at one batch with the interval that the model's uncertainty leaves.

        Parameters
        ----------
        batch : float
            Batch, 1 or more.
        rule : str
            One of `knees.RULES`.
        shares : array of shape (n,), optional
            GPU% to choose from, ascending; by default 5 % steps from the smallest measured share.
        slo_ms : float, optional
            Latency objective [ms], for the rule ``capacity``.
        level : float
            Probability that the interval should hold the knee.

        Returns
        -------
        Knee
            Its ``pct`` is NaN where the share was never varied, or no share meets the SLO.

        Raises
        ------
        ValueError
            As `predict` and `knees.knee_pct`.
        """
        require(0 < level < 1, "level", level, "above 0 and below 1")
        grid = self._grid(shares)
        curve = np.asarray(self.predict(batch, grid))
        pct = self.knee_pct(batch, rule, grid, slo_ms)
        kind = knees.kind_of(grid, curve, pct)
        others = knees.knee_pct(grid, self._curves(batch, grid), rule, batch=batch, slo_ms=slo_ms)
        others = others[~np.isnan(others)]
        if np.isnan(pct) or len(others) == 0:
            return Knee(pct, pct, pct, rule, kind)
        low, high = np.quantile(others, [(1 - level) / 2, (1 + level) / 2], method="closest_observation")
        return Knee(pct, min(pct, float(low)), max(pct, float(high)), rule, kind)

    def room(self, batch: Floats, gpu_pct: Floats) -> tuple[Floats, Floats]:
        """Return how far a curve that obeys `bracket` may lie below and above `predict`.

        Parameters
        ----------
        batch, gpu_pct : arrays of one shape
            As for `predict`. The shares measured at the nearest batch are the known ones.

        Returns
        -------
        (below, above)
            Each of that shape, 0 or more [log units].
        """
        measured = self._correction.at
        nearest = np.abs(np.log(batch)[..., None] - np.unique(measured[:, 0])).argmin(axis=-1)
        below, above = np.zeros(batch.shape), np.zeros(batch.shape)
        for k, level in enumerate(np.unique(measured[:, 0])):
            shares = np.clip(np.sort(self._correction.shares_pct[measured[:, 0] == level]), 1, 100)
            for b in np.unique(batch[nearest == k]):
                here = batch == b
                low, high = bracket(shares, np.asarray(self.predict(b, shares)), gpu_pct[here])
                middle = self._table.log(batch[here], gpu_pct[here])
                below[here], above[here] = np.maximum(middle - np.log(low), 0), np.maximum(np.log(high) - middle, 0)
        return below, above

    def _curves(self, batch: float, grid: Floats) -> Floats:
        """Curves [ms] over `grid` that the points do not rule out: (samples, n), each monotone."""
        b = np.full_like(grid, batch)
        values, vectors = np.linalg.eigh(self._correction.covariance(b, grid))
        draws = np.random.default_rng(0).standard_normal((_SAMPLES, len(grid)))
        logs = self._table.log(b, grid) + draws @ (vectors * np.sqrt(np.maximum(values, 0))).T
        # waves of thread blocks make real curves as rough from share to share as the noise found
        logs += min(_ROUGH * self._correction.noise, _ROUGHEST) * np.random.default_rng(1).standard_normal(logs.shape)
        side = np.random.default_rng(2).uniform(-1, 1, (_SAMPLES, 1))
        below, above = self.room(b, grid)
        logs += np.where(side > 0, side * above, side * below)
        return np.exp(np.minimum.accumulate(logs, axis=1))

    def _grid(self, shares: ArrayLike | None) -> Floats:
        if shares is not None:
            return np.asarray(shares, dtype=np.float64)
        least = float(self._correction.shares_pct.min())
        return np.arange(max(5.0, 5 * np.floor(least / 5)), 101.0, 5.0)


def fit(profile: Profile, model: str, prior: Prior | None = None) -> GpuModel:
    """Fit the GPU% model of one network to a profile's points.

    Own formulation, after Dhakal, Kulkarni, Ramakrishnan (IEEE TCC 2024).

    Parameters
    ----------
    profile : Profile
        At least 2 points of `model` (1 with a prior); they may be few, scattered and noisy. One marked ``starved`` counts
        with its processor time (``core_ms``): had it had its core, it would have taken so long. Where that is
        not told, for several cores, its time is an upper bound, lowered to what the others allow (`monotone.tightened`).
    model : str
        Network in the profile.
    prior : callable, optional
        ``prior(batch, gpu_pct) -> ms`` on arrays of one shape: a kernel model, or another GPU's
        `GpuModel.predict`. Its scale does not matter; its shape holds where points are few, and
        points correct it where they contradict it.

    Returns
    -------
    GpuModel
        Monotone in both arguments, whatever the points.

    Raises
    ------
    ValueError
        If the profile lacks `model` or holds too few points of it, a time is absurd, or the prior
        gives anything but finite times above 0.
    """
    require(isinstance(profile, Profile), "profile", profile, "a Profile, as load_profile and measure return")
    rows = profile.of(model)
    least = 2 if prior is None else 1
    require(len(rows) >= least, f"points of {model}", len(rows), f"{least} or more")
    b, g, ms = (rows[c].to_numpy(dtype=np.float64) for c in ("batch", "gpu_pct", "service_ms"))
    sane = (ms >= 1e-9) & (ms <= 1e12)
    require(bool(sane.all()), "service_ms", None if sane.all() else float(ms[~sane][0]), "from 1e-9 to 1e12 ms")
    ms = tightened(b, g, *_with_their_cores(rows, ms))
    believed = None if prior is None else _guarded(prior)
    shrink, judged = judge_mixture(b, g, ms, believed)
    backbone = fit_mixture(b, g, ms, shrink, believed)
    correction = correct(b, g, np.log(ms / backbone(b, g)), judged)
    table = _tabulate(backbone, correction, b, g)
    notes = [
        f"{name} was never varied: " + ("the model is constant in it" if prior is None else "its effect is the prior's")
        for name, varied in (("batch", backbone.by_batch), ("gpu_pct", backbone.by_share))
        if not varied
    ]
    held_out = float(np.median(np.abs(np.expm1(-judged)))) if len(ms) > least else float("nan")
    error = float(np.median(np.abs(np.exp(table.log(b, g)) / ms - 1)))
    return GpuModel(model, error, held_out, table, correction, backbone.by_share or prior is not None, tuple(notes))


def _with_their_cores(rows: pd.DataFrame, ms: Floats) -> tuple[Floats, NDArray[np.bool_]]:
    """Times of points [ms], starved ones by their processor time; and which still are upper bounds only."""
    if "mark" not in rows:
        return ms, np.zeros(len(ms), dtype=bool)
    starved = rows["mark"].astype(str).str.contains("starved").to_numpy(dtype=bool)
    busy = rows["core_ms"].to_numpy(dtype=float) if "core_ms" in rows else np.full(len(ms), np.nan)
    told = starved & (busy > 0)
    return np.where(told, np.minimum(ms, busy), ms), starved & ~told


def _tabulate(backbone: Mixture, correction: Correction, b: Floats, g: Floats) -> MonotoneTable:
    """Read the model onto nodes: all batches and shares that were measured, and enough others to bend between."""
    batches = np.union1d(np.unique(b), np.geomspace(1, 4 * max(32.0, b.max()), 40))
    shares = np.union1d(np.unique(g), np.arange(1.0, 101.0))
    x, y = np.broadcast_arrays(batches[:, None], shares[None, :])
    log_ms = np.log(backbone(x, y)) + correction.mean(x.ravel(), y.ravel()).reshape(x.shape)
    return MonotoneTable(batches, shares, straighten(log_ms))


def _guarded(prior: Prior) -> Prior:
    def checked(batch: Floats, gpu_pct: Floats) -> Floats:
        ms = np.broadcast_to(np.asarray(prior(batch, gpu_pct), dtype=np.float64), batch.shape)
        good = np.isfinite(ms) & (ms > 0)
        require(bool(good.all()), "prior(batch, gpu_pct)", None if good.all() else float(ms[~good].flat[0]), "finite ms above 0")
        return ms

    return checked


def _checked(batch: ArrayLike, gpu_pct: ArrayLike) -> tuple[Floats, Floats]:
    b, g = np.broadcast_arrays(np.asarray(batch, dtype=np.float64), np.asarray(gpu_pct, dtype=np.float64))
    for name, values, ok, allowed in (
        ("batch", b, np.isfinite(b) & (b >= 1), "1 or more"),
        ("gpu_pct", g, (g >= 1) & (g <= 100), "from 1 to 100"),
    ):
        if not ok.all():
            require(False, name, float(values[~ok].flat[0]), allowed)
    return b, g
