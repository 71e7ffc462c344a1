"""Measured points, kept one a line, so that a later call goes on where an earlier one ended."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from dstack_lab.files import whole_file

Point = dict[str, Any]

#: Below this part of the cores given, others used them too.
STARVED = 0.9
#: Fewer batches than this say little about a 99th percentile.
FEW = 10


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


def digest(windows: list[Point], stable: bool, cores: int | None) -> Point:
    """Return the numbers and the mark of a point that was timed in `windows` by a worker given `cores`."""
    samples = np.concatenate([w["samples_ms"] for w in windows])
    low, median, high, p99 = np.quantile(samples, [0.25, 0.5, 0.75, 0.99])
    effective = sum(w["cpu_ms"] for w in windows) / sum(w["wall_ms"] for w in windows)
    marks = [] if stable else ["unstable"]
    marks += ["starved"] if cores is not None and effective < STARVED * cores else []
    marks += ["few repeats"] if len(samples) < FEW else []
    marks += ["throttled"] if any(w.get("throttled") for w in windows) else []
    gpu_ms = [ms for w in windows for ms in w.get("gpu_ms", [])]
    more = {"gpu_ms": float(np.median(gpu_ms))} if gpu_ms else {}
    for name in ("clock_mhz", "power_w"):
        told = [w[name] for w in windows if w.get(name) is not None]
        more |= {name: float(np.median(told))} if told else {}
    return more | {
        "service_ms": float(median),
        "p99_ms": float(p99),
        "spread": float((high - low) / median),
        "repeats": len(samples),
        "effective_cores": effective,
        "mark": ", ".join(marks),
    }
