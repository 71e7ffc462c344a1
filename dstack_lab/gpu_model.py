"""The GPU% model: a few measured points -> service time at any batch and share, and the knee."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

from dstack_lab import knees
from dstack_lab.checks import require
from dstack_lab.profiles import Profile
from dstack_lab.surface import Floats, Mixture, fit_mixture


@dataclass(frozen=True, slots=True, eq=False)
class GpuModel:
    """Service time of one network at any batch and GPU%; build it with `fit`.

    Parameters
    ----------
    model : str
        Name of the network.
    error : float
        Median absolute error relative to the points it was fitted to (0.02 is 2 %).
    notes : tuple of str
        What a reader must know: a batch or share that was never varied.
    """

    model: str
    error: float
    _surface: Mixture = field(repr=False)
    _least_pct: float = field(repr=False)
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
            A float if both are scalars, else the broadcast shape.

        Raises
        ------
        ValueError
            If a batch is below 1 or a share outside 1 to 100.
        """
        b, g = _checked(batch, gpu_pct)
        ms = self._surface(b, g)
        return float(ms) if ms.ndim == 0 else ms

    def knee_pct(
        self, batch: float, rule: str = "tolerance", shares: ArrayLike | None = None, slo_ms: float | None = None
    ) -> float:
        """Knee at one batch [GPU%], one of `shares` (default: 5 % steps from the smallest measured share)."""
        grid = self._shares(shares)
        return float(knees.knee_pct(grid, self.predict(batch, grid), rule, batch=batch, slo_ms=slo_ms))

    def _shares(self, shares: ArrayLike | None) -> Floats:
        if shares is not None:
            return np.asarray(shares, dtype=np.float64)
        return np.arange(max(5.0, 5 * np.floor(self._least_pct / 5)), 101.0, 5.0)


def fit(profile: Profile, model: str) -> GpuModel:
    """Fit the GPU% model of one network to a profile's points.

    Parameters
    ----------
    profile : Profile
        At least 2 points of `model`; they may be few, scattered and noisy.
    model : str
        Network in the profile.

    Raises
    ------
    ValueError
        If the profile lacks `model`, or holds fewer than 2 points of it.
    """
    rows = profile.of(model)
    require(len(rows) >= 2, f"points of {model}", len(rows), "2 or more")
    b, g, ms = (rows[c].to_numpy(dtype=np.float64) for c in ("batch", "gpu_pct", "service_ms"))
    surface = fit_mixture(b, g, ms)
    error = float(np.median(np.abs(surface(b, g) / ms - 1)))
    notes = [
        f"{name} was never varied: the model is constant in it"
        for name, varied in (("batch", surface.by_batch), ("gpu_pct", surface.by_share))
        if not varied
    ]
    return GpuModel(model, error, surface, float(g.min()), tuple(notes))


def _checked(batch: ArrayLike, gpu_pct: ArrayLike) -> tuple[Floats, Floats]:
    b, g = np.broadcast_arrays(np.asarray(batch, dtype=np.float64), np.asarray(gpu_pct, dtype=np.float64))
    for name, values, ok, allowed in (
        ("batch", b, np.isfinite(b) & (b >= 1), "1 or more"),
        ("gpu_pct", g, (g >= 1) & (g <= 100), "from 1 to 100"),
    ):
        if not ok.all():
            require(False, name, float(values[~ok].flat[0]), allowed)
    return b, g
