"""Measured points, kept one a line, so that a later call goes on where an earlier one ended."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from dstack_lab.checks import require
from dstack_lab.files import whole_file

Point = dict[str, Any]

#: Below this part of the cores given, others used them too.
STARVED = 0.9
#: Fewer batches than this say little about a 99th percentile.
FEW = 10
#: Two consecutive windows whose medians differ by less are the same number.
STABLE = 0.02
#: Confidence of the interval that goes with every median.
LEVEL = 0.95


def key_of(point: Point) -> str:
    """Return what makes two points the same measurement."""
    parts = [point[name] for name in ("model", "batch", "gpu_pct", "device", "mechanism", "versions")]
    return json.dumps(parts)


def load_points(path: Path | None) -> list[Point]:
    """Read the points of earlier calls; a last line cut short by a crash is measured again."""
    if path is None or not path.is_file():
        return []
    points = []
    *lines, rest = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            points.append(json.loads(line))
            key_of(points[-1])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"line {number} of {path.name}: must be a point ({error}); remove it to measure again") from error
    if rest:
        with whole_file(path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return points


def append_point(path: Path, point: Point) -> None:
    """Add one whole line, on the disk before the next point begins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab", buffering=0) as out:
        out.write(json.dumps(point).encode() + b"\n")
        os.fsync(out.fileno())


def fed(windows: list[Point], cores: int | None) -> list[Point]:
    """Those windows in which the worker had its cores, all if there is none: a starved one tells of others' work."""
    return [window for window in windows if not starved([window], cores)] or windows


def starved(windows: list[Point], cores: int | None) -> bool:
    """Whether others used the cores too, where the number of those given is known."""
    return cores is not None and _effective(windows) < STARVED * cores


def settled(windows: list[Point]) -> list[Point]:
    """The last windows of which each median agrees with the one before within `STABLE`: one at least."""
    medians = [float(np.median(w["samples_ms"])) for w in windows]
    first = len(windows) - 1
    while first > 0 and abs(medians[first] - medians[first - 1]) <= STABLE * medians[first]:
        first -= 1
    return windows[first:]


def median_interval(samples: ArrayLike, level: float = LEVEL) -> tuple[float, float]:
    """Confidence interval of the median from order statistics, whatever the distribution of independent samples.

    The number of samples below the median is binomial with probability 1/2: the interval reaches from the r-th smallest to
    the r-th largest sample, with the largest r for which it misses the median with probability 1 - `level` at most [1].

    Parameters
    ----------
    samples : array of shape (n,)
    level : float
        Probability, above 0 and below 1, that the interval holds the median, at least.

    Returns
    -------
    (low, high)
        In units of the samples. Infinite where there are too few of them, fewer than 6 for 95 %.

    References
    ----------
    .. [1] Le Boudec, Performance Evaluation of Computer and Communication Systems, EPFL Press 2010, chapter 2.
    """
    from scipy.special import bdtr

    require(0 < level < 1, "level", level, "above 0 and below 1")
    ordered = np.sort(np.asarray(samples, dtype=float))
    n = len(ordered)
    r = int((bdtr(np.arange(n // 2 + 1), n, 0.5) <= (1 - level) / 2).sum())
    return (float(ordered[r - 1]), float(ordered[n - r])) if r else (-math.inf, math.inf)


def width(windows: list[Point]) -> float:
    """Width of the median's interval over all samples of some windows, as a part of the median."""
    samples = np.concatenate([w["samples_ms"] for w in windows])
    low, high = median_interval(samples)
    return (high - low) / float(np.median(samples))


def digest(windows: list[Point], stable: bool, cores: int | None, interval: float | None = None) -> Point:
    """Return the numbers and the mark of a point that was timed in `windows` by a worker given `cores`.

    With `interval`, a median whose interval is wider than this part of it is marked.
    """
    samples = np.concatenate([w["samples_ms"] for w in windows])
    low, median, high, p99 = np.quantile(samples, [0.25, 0.5, 0.75, 0.99])
    least, most = median_interval(samples)
    marks = [] if stable else ["unstable"]
    marks += ["wide interval"] if interval is not None and not most - least <= interval * median else []
    marks += ["starved"] if starved(windows, cores) else []
    marks += ["few repeats"] if len(samples) < FEW else []
    marks += ["throttled"] if any(w.get("throttled") for w in windows) else []
    gpu_ms = [ms for w in windows for ms in w.get("gpu_ms", [])]
    more = {"gpu_ms": float(np.median(gpu_ms))} if gpu_ms else {}
    # of several threads nobody knows how much they would have waited for each other anyway
    more |= {"core_ms": sum(w["cpu_ms"] for w in windows) / len(samples)} if cores == 1 else {}
    for name in ("clock_mhz", "power_w"):
        told = [w[name] for w in windows if w.get(name) is not None]
        more |= {name: float(np.median(told))} if told else {}
    return more | {
        "service_ms": float(median),
        "low_ms": least if math.isfinite(least) else math.nan,
        "high_ms": most if math.isfinite(most) else math.nan,
        "p99_ms": float(p99),
        "spread": float((high - low) / median),
        "repeats": len(samples),
        "effective_cores": _effective(windows),
        "mark": ", ".join(marks),
    }


def _effective(windows: list[Point]) -> float:
    return float(sum(w["cpu_ms"] for w in windows) / sum(w["wall_ms"] for w in windows))
