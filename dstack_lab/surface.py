"""A parametric service-time surface: a network as a mixture of kernels, each with its own saturation.

A kernel with w units of work [GPU% ms] that cannot use more than q GPU% takes w / min(g, q). A network
is a sequence of such kernels, so its service time is a sum with weights of zero or more:

    L(b, g) = t0 + t1 b + sum_j w_j max(b / g, 1 / q_j)      parallelism grows with the batch
                        + sum_j v_j b max(1 / g, 1 / s_j)     bandwidth saturates at a share
                        + sum_j u_j max(1 / g, 1 / s_j)       work that every batch pays once

Every term never falls with b and never rises with g, hence neither does L: monotone by construction,
and the fit is one small non-negative least-squares problem (no starting values, no local minima).
Own formulation, after Dhakal, Kulkarni, Ramakrishnan (IEEE TCC 2024).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

Floats = NDArray[np.float64]

#: Saturation shares [GPU%] of the terms: 1.5 % steps would not be resolved by any profile.
_PER_ITEM_PCT = np.geomspace(1.0, 100.0, 13)
_FIXED_PCT = np.array([10.0, 15, 20, 25, 30, 40, 50, 60, 70, 80, 90, 100])


@dataclass(frozen=True, slots=True, eq=False)
class Mixture:
    """The fitted sum of kernels.

    Parameters
    ----------
    weights : array of shape (terms,)
        Zero or more, in the order of `_terms`.
    by_batch, by_share : bool
        Whether the fit saw more than one batch or share; if not, the surface is constant in it.
    batch, gpu_pct : float
        The one batch or share that stands in where it was never varied.
    """

    weights: Floats
    by_batch: bool
    by_share: bool
    batch: float
    gpu_pct: float

    def __call__(self, batch: Floats, gpu_pct: Floats) -> Floats:
        """Service time [ms] at batches and shares of one shape."""
        b = batch if self.by_batch else np.full_like(batch, self.batch)
        g = gpu_pct if self.by_share else np.full_like(gpu_pct, self.gpu_pct)
        return np.asarray(_terms(b, g) @ self.weights)


def fit_mixture(batch: Floats, gpu_pct: Floats, service_ms: Floats, rounds: int = 6) -> Mixture:
    """Fit by non-negative least squares on relative error, re-weighted so that outliers count little.

    Parameters
    ----------
    batch, gpu_pct, service_ms : arrays of shape (n,)
        Measured points, n >= 1.
    rounds : int
        Re-weightings (Cauchy weights at the spread of the residuals).
    """
    by_batch, by_share = bool(np.ptp(batch) > 0), bool(np.ptp(gpu_pct) > 0)
    terms = _terms(batch, gpu_pct)
    scale = terms.max(axis=0)
    # a whisper of ridge makes the split between look-alike terms unique and even
    ridge = 0.02 * np.eye(terms.shape[1])
    root = np.ones(len(batch))
    for _ in range(rounds):
        rows = terms / scale / service_ms[:, None] * np.median(service_ms)
        right = np.full(len(batch), np.median(service_ms))
        rows, right = rows * root[:, None], right * root
        solution, _ = nnls(np.vstack([rows, ridge]), np.concatenate([right, np.zeros(len(ridge))]), maxiter=2000)
        weights = solution / scale
        off = np.log(np.maximum(terms @ weights, 1e-12) / service_ms)
        spread = max(1.4826 * float(np.median(np.abs(off))), 0.005)
        root = 1 / np.sqrt(1 + (off / (3 * spread)) ** 2)
    return Mixture(weights, by_batch, by_share, float(batch[0]), float(gpu_pct[0]))


def _terms(batch: Floats, gpu_pct: Floats) -> Floats:
    """Values of all terms, shape (..., terms): each non-decreasing in batch, non-increasing in share."""
    b, g = batch[..., None], gpu_pct[..., None]
    saturating = np.maximum(1 / g, 1 / _FIXED_PCT)
    serial = np.broadcast_to(np.concatenate([np.ones_like(b), b], axis=-1), (*b.shape[:-1], 2))
    return np.concatenate([serial, np.maximum(b / g, 1 / _PER_ITEM_PCT), b * saturating, saturating], axis=-1)
