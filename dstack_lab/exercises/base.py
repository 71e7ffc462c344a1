"""Verdicts on answers: right and why, or a hint that teaches, and which answers count as the same number.

A check computes the right answer from the library, accepts every answer that is right by another
method or rounding, and knows the likely mistakes: each has a hint of its own, and no hint tells the
answer. A check never raises for what a reader typed; it raises for what a notebook's author did wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np

#: Answers this close to the right one, relative to it, are right.
CLOSE = 0.02

#: What an unanswered exercise holds.
UNANSWERED = "There is no answer yet: put yours in place of the three dots, and run the cell again."


@dataclass(frozen=True, slots=True, repr=False)
class Verdict:
    """Whether an answer is right, and a sentence that says why or gives a hint; true if it is right.

    Parameters
    ----------
    passed : bool
    message : str
    """

    passed: bool
    message: str

    def __bool__(self) -> bool:
        return self.passed

    def __repr__(self) -> str:
        return f"{'Right.' if self.passed else 'Not yet.'} {self.message}"


@dataclass(frozen=True, slots=True)
class Mistake:
    """A wrong number that is likely, and what to think about again.

    Parameters
    ----------
    value : float
        What the mistake gives; NaN never matches.
    hint : str
        A sentence that does not tell the right number.
    """

    value: float
    hint: str


def right(message: str) -> Verdict:
    """Return a passed verdict."""
    return Verdict(True, message)


def wrong(hint: str) -> Verdict:
    """Return a failed verdict."""
    return Verdict(False, hint)


def unanswered(answer: object) -> bool:
    """Whether the reader has not touched the exercise: three dots or None."""
    return answer is None or answer is Ellipsis


def as_number(answer: object) -> float | None:
    """Return what a reader means by a number, or None.

    A numpy scalar, an array, list or Series that holds one number, and text such as ``"30 %"`` or
    ``"12.5 ms"`` count; a truth value, and more or fewer numbers than one, do not.
    """
    if isinstance(answer, str):
        words = answer.replace("%", " ").replace("\N{MINUS SIGN}", "-").split()
        try:
            return float(words[0]) if 1 <= len(words) <= 2 else None
        except ValueError:
            return None
    if isinstance(answer, (bool, np.bool_)):
        return None
    if isinstance(answer, Real):
        return float(answer)
    if hasattr(answer, "item") and np.size(answer) == 1:  # type: ignore[arg-type]
        return as_number(answer.item())
    if isinstance(answer, (list, tuple)) and len(answer) == 1:
        return as_number(answer[0])
    return None


def close(answer: float, truth: float, rel: float = CLOSE) -> bool:
    """Whether two numbers are the same answer: within `rel`, or the truth rounded to two or more digits; with `rel` 0, equal."""
    if not (math.isfinite(answer) and math.isfinite(truth)) or rel == 0:
        return answer == truth
    if abs(answer - truth) <= max(rel * abs(truth), 1e-9):
        return True
    return any(math.isclose(answer, float(f"{truth:.{digits}g}"), rel_tol=1e-9) for digits in (2, 3))


def graded(
    answer: object,
    truth: float | Iterable[float],
    unit: str,
    why: str,
    mistakes: Iterable[Mistake] = (),
    hint: str = "Go through the experiment above once more.",
    rel: float = CLOSE,
) -> Verdict:
    """Judge a number.

    Parameters
    ----------
    answer : object
        What the reader typed; see `as_number`.
    truth : float or iterable of float
        The right number; several if methods differ, each of them right.
    unit : str
        Unit of the answer, as a reader writes it: "ms", "GPU%"; "fraction" for a part from 0 to 1, "" for a count.
    why : str
        Sentence for a right answer.
    mistakes : iterable of Mistake
        The first that matches gives the hint. One that happens to equal a right number is no mistake.
    hint : str
        For all other wrong numbers, after a word on whether they are too small or too large.
    rel : float
        See `close`.
    """
    if unanswered(answer):
        return wrong(UNANSWERED)
    given = as_number(answer)
    if given is None or math.isnan(given):
        return wrong(f"Give one number{f' [{unit}]' if unit else ''}, not {_shown(answer)}.")
    if unit == "fraction" and isinstance(answer, str) and "%" in answer:
        given /= 100
    truths = [float(t) for t in truth] if isinstance(truth, Iterable) else [float(truth)]
    if any(close(given, t, rel) for t in truths):
        return right(why)
    for mistake in mistakes:
        if close(given, mistake.value, min(rel, 0.01)):
            return wrong(mistake.hint)
    for factor, said in _units(unit):
        if any(close(given, factor * t, rel) for t in truths):
            return wrong(said)
    side = "small" if given < min(truths) else "large" if given > max(truths) else "far from any right answer"
    return wrong(f"Your number is {'too ' if side in ('small', 'large') else ''}{side}. {hint}")


def as_counts(answer: object, names: Iterable[str]) -> dict[str, float] | None:
    """Return one number per name, from a mapping, a Series or numbers in the order of `names`; None if it is neither."""
    wanted = list(names)
    if hasattr(answer, "to_dict"):
        answer = answer.to_dict()
    if isinstance(answer, (list, tuple, np.ndarray)) and len(answer) == len(wanted):
        answer = dict(zip(wanted, answer, strict=True))
    if not isinstance(answer, Mapping) or set(answer) != set(wanted):
        return None
    found = {name: as_number(answer[name]) for name in wanted}
    return None if any(v is None for v in found.values()) else found  # type: ignore[return-value]


def as_names(answer: object) -> set[str] | None:
    """Return the names a reader listed: one text with commas, spaces or "and", or a list or set of texts; None otherwise."""
    if isinstance(answer, str):
        return set(answer.replace(",", " ").split()) - {"and"}
    if isinstance(answer, Iterable):
        names = list(answer)
        return set(names) if all(isinstance(n, str) for n in names) else None
    return None


def is_whole(number: float) -> bool:
    """Whether a number counts things."""
    return float(number).is_integer()


def _units(unit: str) -> list[tuple[float, str]]:
    """Factors that a slip of units makes, and what to say."""
    if unit == "fraction":
        return [(100.0, "Right idea; give it as a fraction from 0 to 1, not in percent.")]
    if unit == "GPU%":
        return [(0.01, "Right idea; give it in GPU%, from 1 to 100, not as a fraction.")]
    if unit == "ms":
        return [
            (0.001, "Right idea; give it in ms: yours is in seconds."),
            (1000.0, "Right idea; yours is in us: give it in ms."),
        ]
    if unit == "requests/s":
        return [(0.001, "Right idea; yours is per ms: give it per second.")]
    return []


def _shown(answer: Any) -> str:
    """Short text of what was typed."""
    text = repr(answer)
    return text if len(text) <= 60 else f"{type(answer).__name__} of many values"
