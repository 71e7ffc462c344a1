"""Argument checks whose messages name the field, the value and the allowed range."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import TypeVar

T = TypeVar("T")


def require(ok: bool, field: str, value: object, allowed: str) -> None:
    """Raise ``ValueError`` unless `ok`, in the one form used everywhere.

    Raises
    ------
    ValueError
        As ``field = value: must be allowed``.
    """
    if not ok:
        value = value.item() if getattr(value, "ndim", None) == 0 else value  # type: ignore[attr-defined]  # prints as a number
        raise ValueError(f"{field} = {value!r}: must be {allowed}")


def instance(field: str, value: object, kind: type[T], allowed: str) -> T:
    """Return `value` as the object of `kind` that it is; else the message names its type, for a table may be long."""
    if not isinstance(value, kind):
        require(False, field, None if value is None else type(value).__name__, allowed)
    return value  # type: ignore[return-value]


def positive(field: str, value: object) -> float:
    """Return `value` as a finite float above zero."""
    ok = isinstance(value, Real) and not isinstance(value, bool)
    require(ok and math.isfinite(value) and value > 0, field, value, "a finite number above 0")  # type: ignore[operator, arg-type]
    return float(value)  # type: ignore[arg-type]


def non_negative(field: str, value: object) -> float:
    """Return `value` as a finite float of zero or more."""
    ok = isinstance(value, Real) and not isinstance(value, bool)
    require(ok and math.isfinite(value) and value >= 0, field, value, "a finite number, 0 or more")  # type: ignore[operator, arg-type]
    return float(value)  # type: ignore[arg-type]


def percent(field: str, value: object) -> float:
    """Return `value` as a GPU% between 1 and 100."""
    ok = isinstance(value, Real) and not isinstance(value, bool)
    require(ok and 1 <= value <= 100, field, value, "a GPU% from 1 to 100")  # type: ignore[operator]
    return float(value)  # type: ignore[arg-type]


def count(field: str, value: object, least: int = 1) -> int:
    """Return `value` as an integer of at least `least`."""
    ok = isinstance(value, Integral) and not isinstance(value, bool)
    require(ok and value >= least, field, value, f"an integer, {least} or more")  # type: ignore[operator]
    return int(value)  # type: ignore[call-overload, no-any-return]
