"""Service times of one network by batch and share, dense, for those who ask often."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dstack_lab.checks import count, require


@dataclass(frozen=True, slots=True, eq=False)
class ServiceTable:
    """Service time of one network on a dense grid, for policies and engines that ask often.

    Parameters
    ----------
    ms : numpy.ndarray, shape (batch_max, 100)
        ``ms[b - 1, g - 1]`` is the service time [ms] of a batch of b at g GPU%.
    """

    ms: NDArray[np.float64]
    _rows: list[list[float]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        ms = np.ascontiguousarray(self.ms, dtype=float)
        require(ms.ndim == 2 and ms.shape[0] >= 1 and ms.shape[1] == 100, "ms shape", ms.shape, "(batch_max, 100)")
        require(bool(np.isfinite(ms).all() and (ms > 0).all()), "ms", float(ms.min()), "finite and above 0")
        ms.setflags(write=False)
        object.__setattr__(self, "ms", ms)
        object.__setattr__(self, "_rows", ms.tolist())  # plain lists: ten times faster to index than an array

    def __reduce__(self) -> tuple[type[ServiceTable], tuple[NDArray[np.float64]]]:
        """Travel between processes without the lists, which take ten times longer than the array."""
        return ServiceTable, (self.ms,)

    @property
    def batch_max(self) -> int:
        """Largest batch that was profiled."""
        return int(self.ms.shape[0])

    def at(self, batch: int, gpu_pct: float) -> float:
        """Service time [ms] of one batch; between whole GPU% it is interpolated.

        Raises
        ------
        ValueError
            If `batch` is not in 1 to `batch_max`, or `gpu_pct` not in 1 to 100.
        """
        low = int(gpu_pct)
        if not (1 <= batch <= len(self._rows) and 1 <= gpu_pct <= 100):
            require(False, "(batch, gpu_pct)", (batch, gpu_pct), f"a batch of 1 to {self.batch_max} at 1 to 100 GPU%")
        row = self._rows[batch - 1]
        if low == gpu_pct:
            return row[low - 1]
        return row[low - 1] + (gpu_pct - low) * (row[low] - row[low - 1])

    def knee_pct(self, batch: int, tolerance: float = 0.05) -> float:
        """Smallest whole GPU% whose service time is within `tolerance` of the best."""
        row = self.ms[count("batch", batch) - 1]
        return float(np.argmax(row <= (1 + tolerance) * row.min()) + 1)
