"""What physics leaves open between two measured shares, whatever model one believes.

As a function of u = 1 / share, service time never falls, the work L / u never rises, and gains
diminish: the curve is convex. Between two measured shares it therefore lies under their chord, and
over both neighbours' chords extended. Where few shares were measured that room is wide, and the knee
may be anywhere in it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def bracket(shares: Floats, service_ms: Floats, at_pct: Floats) -> tuple[Floats, Floats]:
    """Bounds on one batch's service time [ms], given it at some shares.

    Parameters
    ----------
    shares, service_ms : arrays of shape (n,)
        Known points, shares ascending, times not rising, n >= 1.
    at_pct : array of shape (m,)
        Shares to bound [GPU%].

    Returns
    -------
    (low_ms, high_ms)
        Each of shape (m,); equal at a known share if the known points are convex themselves.
    """
    u, known, at = 1 / shares[::-1], service_ms[::-1], 1 / at_pct
    n = len(u)
    right = np.searchsorted(u, at, side="left")
    left = right - 1
    exact = np.isclose(at, u[np.minimum(right, n - 1)], rtol=1e-9)
    i, j = np.maximum(left, 0), np.minimum(right, n - 1)
    # more share is never slower, less share never does more work
    low = np.where(left >= 0, known[i], known[0] * at / u[0])
    low = np.maximum(low, np.where(right < n, known[j] * at / u[j], 0.0))
    high = np.where(right < n, known[j], known[-1] * at / u[-1])
    if n > 1:
        slope = np.diff(known) / np.diff(u)
        inner = (left >= 0) & (right < n)
        high = np.where(inner, known[i] + slope[np.minimum(i, n - 2)] * (at - u[i]), high)
        before, after = np.clip(left - 1, 0, n - 2), np.clip(right, 0, n - 2)
        low = np.maximum(low, np.where(left >= 1, known[i] + slope[before] * (at - u[i]), 0.0))
        low = np.maximum(low, np.where(right <= n - 2, known[j] - slope[after] * (u[j] - at), 0.0))
    low, high = np.where(exact, known[j], low), np.where(exact, known[j], high)
    return np.minimum(low, high), high
