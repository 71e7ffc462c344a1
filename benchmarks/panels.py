"""Time from a control's new value to the redrawn figure, in the kernel, by panel.

    python benchmarks/panels.py [--rounds 15]

Prints medians of processor time and of wall time [ms]; closed forms should take under 150 ms, simulations under 500 ms. What a
browser adds is not in them. The last row zooms in a timeline of 50,000 launches or more.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import dstack_lab as lab

LIMITS_MS = {"KneeExplorer": 150, "BatchPlanner": 150, "ModelAnatomy": 150, "PolicyRace": 500, "ScheduleExplorer": 500}
MOVES: dict[str, tuple[str, Sequence[Any]]] = {
    "KneeExplorer": ("gpu_pct", range(20, 90)),
    "BatchPlanner": ("slo_ms", [float(ms) for ms in range(20, 90)]),
    "ModelAnatomy": ("gpu_pct", range(20, 90)),
    "PolicyRace": ("load", [0.2 + 0.01 * k for k in range(70)]),
    "ScheduleExplorer": ("load", [0.2 + 0.01 * k for k in range(70)]),
}


def timed(move: Callable[[Any], None], values: Sequence[Any]) -> tuple[float, float]:
    """Median processor and wall time [ms] of `move`, after one that is not counted."""
    move(values[0])
    used = []
    for value in values[1:]:
        before = time.process_time(), time.perf_counter()
        move(value)
        used.append((1000 * (time.process_time() - before[0]), 1000 * (time.perf_counter() - before[1])))
    return statistics.median(u for u, _ in used), statistics.median(w for _, w in used)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    print(f"{'panel':34s} {'processor':>10s} {'wall':>8s} {'limit':>7s}  [ms], medians of {rounds}")
    for name, (field, values) in MOVES.items():
        panel = getattr(lab.panels, name)()
        _ = panel.figure
        used = timed(lambda v, panel=panel, field=field: setattr(getattr(panel, field), "value", v), values[: rounds + 1])
        print(f"{name:34s} {used[0]:10.0f} {used[1]:8.0f} {LIMITS_MS[name]:7d}")
    panel = lab.panels.ScheduleExplorer("C-4", duration_ms=400_000.0)
    widget = panel.figure
    panel.span_ms.value = panel.duration_ms
    launches = panel.facts()["launches"]
    used = timed(lambda end: setattr(widget.layout.xaxis, "range", (0, end)), [40_000 + 20_000 * k for k in range(rounds + 1)])
    print(f"{f'zoom among {launches:,} launches':34s} {used[0]:10.0f} {used[1]:8.0f} {500:7d}")


if __name__ == "__main__":
    main()
