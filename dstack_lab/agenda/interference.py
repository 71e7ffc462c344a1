"""The constants of `Contention` from recorded pairs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from dstack_lab.checks import require
from dstack_lab.contention import Contention

#: Exponents that are tried; below 0 the shorter launch would be felt more than the longer.
EXPONENTS = (0.0, 2.0)
KEY = ("mechanism", "model", "batch", "gpu_pct")

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Fit:
    """Constants, and how well they say what was measured.

    Parameters
    ----------
    contention : Contention
    sides : int
        How many sides of pairs they were fitted to.
    error : float
        Median absolute error of the slowdown.
    constant_error : float
        That of the best single slowdown, for comparison.
    """

    contention: Contention
    sides: int
    error: float
    constant_error: float

    def __str__(self) -> str:
        made = f"Contention(slowdown={self.contention.slowdown:.4g}, exponent={self.contention.exponent:.4g})"
        return f"{made} from {self.sides} sides of pairs; median error {self.error:.3f}, of a constant {self.constant_error:.3f}"


def slowdowns(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of pairs with what both sides take alone.

    Parameters
    ----------
    table : pandas.DataFrame
        As item ``pairs`` records it: ``mechanism``, ``sharing`` (``"alone"``: the side itself), ``model``, ``batch``,
        ``gpu_pct``, ``beside``, ``beside_batch``, ``beside_pct``, ``service_ms``.

    Returns
    -------
    pandas.DataFrame
        Further columns ``alone_ms``, ``beside_alone_ms`` and ``slowdown``: service time beside over alone. Sides of
        which something was not measured are left out.
    """
    alone = table[table["sharing"] == "alone"].set_index(list(KEY))["service_ms"]
    require(bool(alone.index.is_unique), "rows alone", len(alone), "one for each mechanism, model, batch and GPU%")
    pairs = table[table["sharing"] != "alone"]
    pairs = pairs.join(alone.rename("alone_ms"), on=list(KEY))
    pairs = pairs.join(alone.rename("beside_alone_ms"), on=["mechanism", "beside", "beside_batch", "beside_pct"])
    pairs = pairs.assign(slowdown=pairs["service_ms"] / pairs["alone_ms"])
    return pairs.dropna(subset=["slowdown", "beside_alone_ms"])


def fitted(table: pd.DataFrame) -> Fit:
    """Find the constants with the least sum of absolute errors over both sides of all pairs on disjoint shares.

    For an exponent e the best slowdown is the weighted median of (measured - 1) / (L_j / L_i) ** e, exactly; the
    exponent is found by a grid and then a line search.

    Parameters
    ----------
    table : pandas.DataFrame
        See `slowdowns`; rows whose ``sharing`` is ``"shares"`` are fitted to.

    Raises
    ------
    ValueError
        If no pair has both its sides alone.
    """
    sides = slowdowns(table)
    sides = sides[sides["sharing"] == "shares"]
    require(len(sides) > 0, "sides of pairs on disjoint shares", 0, "1 or more, each with both networks measured alone")
    more = sides["slowdown"].to_numpy(dtype=float) - 1
    ratio = (sides["beside_alone_ms"] / sides["alone_ms"]).to_numpy(dtype=float)
    if np.ptp(np.log(ratio)) < 1e-9:  # equally long: no exponent can be told from another
        exponent = 0.0
    else:
        grid = np.linspace(*EXPONENTS, 61)
        best = grid[int(np.argmin([_loss(e, ratio, more) for e in grid]))]
        near = (max(best - 0.05, EXPONENTS[0]), min(best + 0.05, EXPONENTS[1]))
        exponent = float(minimize_scalar(_loss, bounds=near, args=(ratio, more), method="bounded", options={"xatol": 1e-6}).x)
    slowdown = max(_slowdown(exponent, ratio, more), 0.0)
    if slowdown == 0:  # they cost each other nothing: any exponent says so
        exponent = 0.0
    errors = np.abs(more - slowdown * ratio**exponent)
    constant = np.abs(more - np.median(more))
    return Fit(Contention(slowdown, exponent), len(sides), float(np.median(errors)), float(np.median(constant)))


def _slowdown(exponent: float, ratio: Floats, more: Floats) -> float:
    """Weighted median: the least sum of |more - s · ratio ** exponent| over s."""
    weight = ratio**exponent
    order = np.argsort(more / weight)
    reached = np.cumsum(weight[order])
    return float((more / weight)[order[int(np.searchsorted(reached, reached[-1] / 2))]])


def _loss(exponent: float, ratio: Floats, more: Floats) -> float:
    return float(np.abs(more - _slowdown(exponent, ratio, more) * ratio**exponent).sum())
