"""What a backbone leaves over: a Gaussian process on log residuals, with its own honest spread.

A library switches kernels between batch sizes, so residuals jump with the batch but are smooth in the
share. The covariance says just that, in log batch x and log share y:

    k = OU(x) (level + tilt y y') + Matern32(x, y) + noise

OU (Ornstein-Uhlenbeck) interpolates linearly between measured batches and allows a kink or step at
each of them; the Matern part is smooth in both. Sizes of the parts come from the marginal likelihood
on a small fixed grid: deterministic, no gradient, no local minimum.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve, solve_triangular

Floats = NDArray[np.float64]

#: Level, tilt, smooth part and noise: standard deviations [log units].
Sizes = tuple[float, float, float, float]

_BATCH_LENGTH = 1.5
_SMOOTH_LENGTHS = (1.5, 0.8)
_MIDDLE_PCT = 30.0

#: Sizes of tilt, smooth part and noise, relative to the level of the batch part.
_GRID = tuple(product((0.1, 0.3, 0.8), (0.1, 0.3, 1.0), (0.02, 0.1, 0.4, 1.5)))

#: Before any data, residuals are thought to be about this large (log units), worth this many points.
_BELIEF, _BELIEF_POINTS = 0.08, 3.0

#: n points that agree perfectly still leave a spread of this over sqrt(n): 1.4 % for 12 of them.
_UNPROVEN = 0.05

#: Sizes for planning: a dozen points cannot tell how much of their doubt is in which part.
_PLANNING: Sizes = (1.0, 0.7, 0.3, 0.1)

_MOST_POINTS, _MOST_FOR_SIZES = 400, 100


@dataclass(frozen=True, slots=True, eq=False)
class Correction:
    """Posterior of the log residual, given measured residuals.

    Parameters
    ----------
    at : array of shape (n, 2)
        Log batch and log share of the measured points.
    factor : array of shape (n, n)
        Lower Cholesky factor of their covariance with noise.
    alpha : array of shape (n,)
        Covariance^-1 times residuals.
    sizes : tuple of float
        See `Sizes`.
    """

    at: Floats
    factor: Floats
    alpha: Floats
    sizes: Sizes

    @property
    def noise(self) -> float:
        """Spread of one new measurement [log units], no smaller than so few points can prove."""
        return max(self.sizes[3], _UNPROVEN / float(np.sqrt(len(self.at))))

    @property
    def shares_pct(self) -> Floats:
        """Share of each measured point [GPU%]."""
        return np.round(_MIDDLE_PCT * np.exp(self.at[:, 1]), 9)

    def mean(self, batch: Floats, gpu_pct: Floats) -> Floats:
        """Give the expected log residual at points of one flat shape; beyond the measured range that of its edge."""
        low, high = self.at.min(axis=0), self.at.max(axis=0)
        to = np.clip(_logs(batch, gpu_pct), low, high)
        return np.asarray(_covariance(to, self.at, self.sizes) @ self.alpha)

    def covariance(self, batch: Floats, gpu_pct: Floats) -> Floats:
        """Joint covariance of the true log residual at points of shape (m,): (m, m)."""
        to = _logs(batch, gpu_pct)
        half = solve_triangular(self.factor, _covariance(self.at, to, self.sizes), lower=True)
        return np.asarray(_covariance(to, to, self.sizes) - half.T @ half)

    def spread(self, batch: Floats, gpu_pct: Floats) -> Floats:
        """Give the standard deviation of the true log residual at points of shape (m,)."""
        to = _logs(batch, gpu_pct)
        half = solve_triangular(self.factor, _covariance(self.at, to, self.sizes), lower=True)
        level, tilt, smooth, _ = self.sizes
        prior = level**2 + (tilt * to[:, 1]) ** 2 + smooth**2
        return np.asarray(np.sqrt(np.maximum(prior - (half**2).sum(axis=0), 1e-12)))


def correct(batch: Floats, gpu_pct: Floats, residual: Floats, judged: Floats, rounds: int = 3) -> Correction:
    """Fit the correction at measured points of shape (n,).

    Parameters
    ----------
    batch, gpu_pct : arrays of shape (n,)
        Measured points.
    residual : array of shape (n,)
        Log of measured over backbone.
    judged : array of shape (n,)
        The same with a backbone that had not seen the point. A flexible backbone passes through the
        few points it was fitted to; only these say how wrong it is between them.
    rounds : int
        Re-weightings: a point that its neighbours contradict is given noise enough to explain it.
    """
    keep = _thin(len(batch), _MOST_POINTS)
    at, residual = _logs(batch[keep], gpu_pct[keep]), residual[keep]
    sizes = _sizes(at, _tamed(judged[keep]))
    noise = np.full(len(at), sizes[3] ** 2 + 1e-9)
    true = _covariance(at, at, sizes)
    for _ in range(rounds):
        inverse = np.linalg.inv(true + np.diag(noise))
        left_out, spread = (inverse @ residual) / np.diag(inverse), 1 / np.sqrt(np.diag(inverse))
        odd = np.abs(left_out) > 3 * np.maximum(spread, 0.02)
        noise = np.where(odd, np.maximum(noise, left_out**2), noise)
    factor = np.linalg.cholesky(true + np.diag(noise))
    return Correction(at, np.asarray(factor, dtype=np.float64), cho_solve((factor, True), residual), sizes)


def doubt_removed(batch: Floats, gpu_pct: Floats, measured: NDArray[np.bool_], weights: Floats) -> Floats:
    """Weighted variance that measuring each point would take from all points, in arbitrary units.

    Parameters
    ----------
    batch, gpu_pct : arrays of shape (n,)
        All points of interest.
    measured : array of bool, shape (n,)
        Which of them are known already.
    weights : array of shape (n,)
        How much each point's doubt matters.
    """
    at, noise2 = _logs(batch, gpu_pct), _PLANNING[3] ** 2
    known = _covariance(at[measured], at[measured], _PLANNING) + noise2 * np.eye(int(measured.sum()))
    half = solve_triangular(np.linalg.cholesky(known), _covariance(at[measured], at, _PLANNING), lower=True)
    left = _covariance(at, at, _PLANNING) - half.T @ half
    return np.asarray((left**2 @ weights) / (np.diag(left) + noise2))


def _tamed(residual: Floats) -> Floats:
    """Residuals with the few wildest pulled in to 4 robust standard deviations."""
    limit = 4 * max(1.4826 * float(np.median(np.abs(residual))), 0.005)
    return np.clip(residual, -limit, limit)


def _sizes(at: Floats, residual: Floats) -> Sizes:
    """Level, tilt, smooth part and noise of largest marginal likelihood, the common scale profiled out."""
    few = _thin(len(at), _MOST_FOR_SIZES)
    at, residual = at[few], residual[few]
    n = len(at)
    best, chosen = np.inf, (0.0, 0.0, 0.0, 0.0)
    for tilt, smooth, noise in _GRID:
        matrix = _covariance(at, at, (1.0, tilt, smooth, noise)) + (noise**2 + 1e-8) * np.eye(n)
        factor = np.linalg.cholesky(matrix)
        white = solve_triangular(factor, residual, lower=True)
        total = 1 + tilt**2 + smooth**2
        scale2 = (white @ white + _BELIEF_POINTS * _BELIEF**2 / total) / (n + _BELIEF_POINTS)
        cost = (n + _BELIEF_POINTS) * np.log(scale2) + 2 * np.log(np.diag(factor)).sum() + _BELIEF_POINTS * np.log(total)
        if cost < best:
            best, scale = cost, float(np.sqrt(scale2))
            chosen = (scale, scale * tilt, scale * smooth, scale * noise)
    return chosen


def _covariance(a: Floats, b: Floats, sizes: Sizes) -> Floats:
    level, tilt, smooth, _ = sizes
    gap = np.abs(a[:, None, 0] - b[None, :, 0])
    batch_part = np.exp(-gap / _BATCH_LENGTH) * (level**2 + tilt**2 * a[:, None, 1] * b[None, :, 1])
    far = np.sqrt(3 * ((gap / _SMOOTH_LENGTHS[0]) ** 2 + ((a[:, None, 1] - b[None, :, 1]) / _SMOOTH_LENGTHS[1]) ** 2))
    return np.asarray(batch_part + smooth**2 * (1 + far) * np.exp(-far))


def _logs(batch: Floats, gpu_pct: Floats) -> Floats:
    """Log batch and log share (centred, so that the tilt pivots mid-range), shape (n, 2)."""
    return np.stack([np.log(batch), np.log(gpu_pct / _MIDDLE_PCT)], axis=-1)


def _thin(n: int, most: int) -> NDArray[np.intp]:
    """Choose at most `most` of n indices: a fixed shuffle, so that no grid direction is favoured."""
    if n <= most:
        return np.arange(n)
    return np.sort(np.random.default_rng(0).permutation(n)[:most])
