"""How service times scatter around their prediction: factors of mean 1, sampled from a numpy Generator."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from dstack_lab.checks import positive


@runtime_checkable
class Variability(Protocol):
    """What an engine needs to know of it."""

    def sample(self, n: int, rng: np.random.Generator) -> NDArray[np.float64]:
        """Return `n` independent factors above 0, of mean 1."""


@dataclass(frozen=True, slots=True)
class Lognormal:
    """Factors of a lognormal distribution: a long tail of slow batches, as measured on busy machines.

    Parameters
    ----------
    cv : float
        Coefficient of variation (standard deviation / mean), above 0.
    """

    cv: float

    def __post_init__(self) -> None:
        positive("cv", self.cv)

    def sample(self, n: int, rng: np.random.Generator) -> NDArray[np.float64]:
        """Return `n` independent factors above 0, of mean 1."""
        sigma = math.sqrt(math.log1p(self.cv**2))
        return rng.lognormal(-(sigma**2) / 2, sigma, n)


@dataclass(frozen=True, slots=True)
class Exponential:
    """Exponential factors, the M of M/M/1: for checks against queueing theory."""

    def sample(self, n: int, rng: np.random.Generator) -> NDArray[np.float64]:
        """Return `n` independent factors above 0, of mean 1."""
        return rng.standard_exponential(n)
