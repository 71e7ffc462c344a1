"""A parametric service-time surface: a network as a mixture of kernels, each with its own saturation.

A kernel with w units of work [GPU% ms] that cannot use more than q GPU% takes w / min(g, q). A network
is a sequence of such kernels, so its service time is a sum with weights of zero or more:

    L(b, g) = t0 + t1 b + sum_j w_j max(b / g, 1 / q_j)      parallelism grows with the batch
                        + sum_j v_j b max(1 / g, 1 / s_j)     bandwidth saturates at a share
                        + sum_j u_j max(1 / g, 1 / s_j)       work that every batch pays once
                        + sum_k r_k(b) (t_k + sum_j u_jk max(1 / g, 1 / s_j))

where r_k climbs from 0 to 1 between the measured batches k and k + 1: the library switched kernels
there. Every term never falls with b and never rises with g, hence neither does L: monotone by
construction, and the fit is one small non-negative least-squares problem (no starting values, no
local minima). Own formulation, after Dhakal, Kulkarni, Ramakrishnan (IEEE TCC 2024).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

Floats = NDArray[np.float64]

#: (batch, gpu_pct) arrays of one shape -> service time [ms], same shape.
Prior = Callable[[Floats, Floats], Floats]

#: Saturation shares [GPU%] of the terms: finer than any profile resolves.
_PER_ITEM_PCT = np.geomspace(1.0, 100.0, 13)
_FIXED_PCT = np.array([10.0, 15, 20, 25, 30, 40, 50, 60, 70, 80, 90, 100])
_STEP_PCT = np.array([10.0, 20, 40, 70, 100])

#: Ridge on each term's part of the whole: a trace of it makes look-alike terms share their weight
#: evenly; steps must pay ten times more, so that they appear only where a smooth batch law fails.
_RIDGE, _STEP_RIDGE = 0.02, 0.2

#: Factors on the backbone's ridge that compete on left-out points; the first wins ties.
_SHRINKS = (1.0, 4.0, 16.0)

#: Left-out rounds are what a fit costs: fewer where many points make each one dear.
_FEW, _MANY = 12, 60

_MOST_KNOTS = 12


@dataclass(frozen=True, slots=True, eq=False)
class Mixture:
    """The fitted sum of kernels, on top of a prior if one was given.

    Parameters
    ----------
    weights : array of shape (terms,)
        Zero or more, in the order of `_terms`.
    knots : array of shape (k,)
        Batches between which a step may lie.
    prior : callable or None
        First term of the sum, weighted like the others.
    by_batch, by_share : bool
        Whether the fit saw more than one batch or share; if not, the terms are constant in it.
    batch, gpu_pct : float
        The one batch or share that stands in where it was never varied.
    """

    weights: Floats
    knots: Floats
    prior: Prior | None
    by_batch: bool
    by_share: bool
    batch: float
    gpu_pct: float

    def __call__(self, batch: Floats, gpu_pct: Floats) -> Floats:
        """Service time [ms] at batches and shares of one shape."""
        return np.asarray(self._all_terms(batch, gpu_pct) @ self.weights)

    def _all_terms(self, batch: Floats, gpu_pct: Floats) -> Floats:
        b = batch if self.by_batch else np.full_like(batch, self.batch)
        g = gpu_pct if self.by_share else np.full_like(gpu_pct, self.gpu_pct)
        own = _terms(b, g, self.knots)
        if self.prior is None:
            return own
        return np.concatenate([np.asarray(self.prior(batch, gpu_pct))[..., None], own], axis=-1)


def fit_mixture(
    batch: Floats, gpu_pct: Floats, service_ms: Floats, shrink: float = 1.0, prior: Prior | None = None, rounds: int = 4
) -> Mixture:
    """Fit by non-negative least squares on relative error, re-weighted so that outliers count little.

    Parameters
    ----------
    batch, gpu_pct, service_ms : arrays of shape (n,)
        Measured points, n >= 1.
    shrink : float
        Factor on the ridge: larger is smoother, and closer to the prior if there is one.
    prior : callable, optional
        Service time [ms] expected before measuring; only its shape matters.
    rounds : int
        Re-weightings (Cauchy weights at the spread of the residuals).
    """
    knots = np.unique(batch)
    if len(knots) > _MOST_KNOTS:
        even = np.geomspace(knots[0], knots[-1], _MOST_KNOTS)
        knots = np.unique(knots[np.abs(np.log(knots[:, None] / even)).argmin(axis=0)])
    varied = bool(np.ptp(batch) > 0), bool(np.ptp(gpu_pct) > 0)
    blank = Mixture(np.zeros(0), knots, prior, *varied, float(batch[0]), float(gpu_pct[0]))
    parts = blank._all_terms(batch, gpu_pct) / service_ms[:, None]
    scale = np.sqrt((parts**2).mean(axis=0))
    parts = parts / scale
    smooth = 2 + len(_PER_ITEM_PCT) + 2 * len(_FIXED_PCT)
    ridge = np.full(len(scale), _STEP_RIDGE * shrink)
    first = 0 if prior is None else 1
    ridge[: first + smooth] = _RIDGE * shrink
    ridge[:first] = 1e-3
    trust = np.ones(len(batch))
    for _ in range(rounds):
        rows = np.vstack([parts * trust[:, None], np.diag(ridge)])
        share, _ = nnls(rows, np.concatenate([trust, np.zeros(len(ridge))]), maxiter=20 * len(ridge))
        off = np.log(np.maximum(parts @ share, 1e-12))
        spread = max(1.4826 * float(np.median(np.abs(off))), 0.005)
        trust = 1 / np.sqrt(1 + (off / (3 * spread)) ** 2)
    return Mixture(share / scale, knots, prior, *varied, float(batch[0]), float(gpu_pct[0]))


def judge_mixture(b: Floats, g: Floats, ms: Floats, prior: Prior | None = None) -> tuple[float, Floats]:
    """Leave points out in turn; return the best ridge factor and the log errors (n,) at left-out points."""
    n = len(ms)
    if n < (4 if prior is None else 3):
        return _SHRINKS[-1], np.zeros(n)
    folds = np.random.default_rng(0).permutation(n) % (n if n <= _FEW else 8 if n <= _MANY else 4)
    best, chosen, judged = np.inf, _SHRINKS[0], np.zeros(n)
    for shrink in _SHRINKS if n <= _MANY else _SHRINKS[:1]:
        off = np.zeros(n)
        for fold in range(folds.max() + 1):
            out = folds == fold
            kept = fit_mixture(b[~out], g[~out], ms[~out], shrink, prior)
            off[out] = np.log(ms[out] / kept(b[out], g[out]))
        cost = float(np.minimum(np.abs(off), 0.5).mean())
        if cost < 0.95 * best:
            best, chosen, judged = cost, shrink, off
    return chosen, judged


def _terms(batch: Floats, gpu_pct: Floats, knots: Floats) -> Floats:
    """Values of all own terms, shape (..., terms): each non-decreasing in batch, non-increasing in share."""
    b, g = batch[..., None], gpu_pct[..., None]
    one = np.ones_like(b)
    saturating = np.maximum(1 / g, 1 / _FIXED_PCT)
    smooth = [one, b, np.maximum(b / g, 1 / _PER_ITEM_PCT), b * saturating, saturating]
    if len(knots) == 1:
        return np.concatenate(smooth, axis=-1)
    level = np.log(knots)
    climb = np.clip((np.log(b) - level[:-1]) / np.diff(level), 0, 1)
    shape = np.concatenate([one, np.maximum(1 / g, 1 / _STEP_PCT)], axis=-1)
    steps = climb[..., :, None] * shape[..., None, :]
    return np.concatenate([*smooth, steps.reshape(*batch.shape, -1)], axis=-1)
