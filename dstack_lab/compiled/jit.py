"""The one place that calls numba."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numba

F = TypeVar("F", bound=Callable[..., object])


def jit(function: F) -> F:
    """Compile `function` at its first call, and keep the machine code beside it or in the user's cache folder."""
    try:
        return numba.njit(function, cache=True, error_model="numpy")  # type: ignore[no-any-return]
    except RuntimeError:  # neither folder can be written: compile anew in each process
        return numba.njit(function, error_model="numpy")  # type: ignore[no-any-return]
