"""A table of service times that is monotone whatever went into it, and stays so between its nodes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class MonotoneTable:
    """Log service time over batch and share: never falls with the batch, never rises with the share.

    Parameters
    ----------
    batches, shares : arrays of shape (m,) and (n,)
        Nodes, ascending, two or more each.
    log_ms : array of shape (m, n)
        Log service time [log ms], monotone; `straighten` makes it so.
    """

    batches: Floats
    shares: Floats
    log_ms: Floats

    def log(self, batch: Floats, gpu_pct: Floats) -> Floats:
        """Interpolate in log batch and log share, at arrays of one shape; return log ms.

        Beyond the last batch the table's last slope goes on.
        """
        x, y = np.log(batch), np.log(gpu_pct)
        rows, columns = np.log(self.batches), np.log(self.shares)
        i = np.clip(np.searchsorted(rows, x, side="right") - 1, 0, len(rows) - 2)
        j = np.clip(np.searchsorted(columns, y, side="right") - 1, 0, len(columns) - 2)
        u = np.clip((x - rows[i]) / (rows[i + 1] - rows[i]), 0.0, 1.0)
        v = np.clip((y - columns[j]) / (columns[j + 1] - columns[j]), 0.0, 1.0)
        table = self.log_ms
        left = (1 - u) * table[i, j] + u * table[i + 1, j]
        right = (1 - u) * table[i, j + 1] + u * table[i + 1, j + 1]
        # one slope for all shares keeps them in order
        slope = float((table[-1] - table[-2]).mean() / (rows[-1] - rows[-2]))
        return np.asarray((1 - v) * left + v * right + slope * np.maximum(x - rows[-1], 0.0))


def straighten(log_ms: Floats) -> Floats:
    """Mean of the tightest monotone tables above and below: monotone itself, no change where already so."""
    above = np.maximum.accumulate(np.maximum.accumulate(log_ms[:, ::-1], axis=1)[:, ::-1], axis=0)
    below = np.minimum.accumulate(np.minimum.accumulate(log_ms, axis=1)[::-1], axis=0)[::-1]
    return np.asarray((above + below) / 2)


def tightened(batch: Floats, gpu_pct: Floats, ms: Floats, loose: NDArray[np.bool_]) -> Floats:
    """Lower times that are upper bounds only to what monotony allows beside those that are not.

    Parameters
    ----------
    batch, gpu_pct, ms : arrays of shape (n,)
        Points and their times [ms].
    loose : array of bool of shape (n,)
        Points that took at most so long: others used their worker's cores too.

    Returns
    -------
    array of shape (n,)
        Of a loose point the least of its time and those of the others with no smaller batch and no larger share.
    """
    covers = (batch[None, :] >= batch[:, None]) & (gpu_pct[None, :] <= gpu_pct[:, None]) & ~loose[None, :]
    least = np.where(covers, ms[None, :], np.inf).min(axis=1, initial=np.inf)
    return np.where(loose, np.minimum(ms, least), ms)
