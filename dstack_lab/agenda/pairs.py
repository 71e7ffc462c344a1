"""Item 4: networks beside each other, at complementary shares and under MPS without caps."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from dstack_lab.agenda.interference import fitted
from dstack_lab.agenda.record import Record, Step
from dstack_lab.agenda.target import CPU_MODELS, Target
from dstack_lab.devices import Device, Worker

#: Networks, shares of the first of two (the other has what is left), and batches side by side.
MODELS = ("resnet50", "vgg19", "mobilenet_v2", "alexnet")
SPLITS = (50, 25, 75)
BATCHES = ((16, 16), (1, 16), (16, 1))
WINDOW_S = 1.0
#: Parts of the window that are discarded: one side may not run yet, or no longer.
HEAD, TAIL = 0.2, 0.15
READY_S = 120.0


def run(target: Target, record: Record) -> None:
    """Time each network alone, then each pair, then fit what they cost each other."""
    steps: list[Step] = []
    for mechanism in target.mechanisms:
        device = target.device(mechanism)
        models = CPU_MODELS if not target.on_gpu else MODELS[:2] if target.quick else MODELS
        splits = split(device.shares(), SPLITS[:1] if target.quick else SPLITS)
        pairs = [*itertools.combinations(models, 2), *([] if target.quick else [(m, m) for m in models])]
        batches = ((2, 2), (1, 4)) if target.quick else BATCHES
        alone = sorted({b for both in batches for b in both})
        known: set[float] = set()
        for split_of_both in splits:  # each with what it needs alone first: a call that ends early has whole pairs
            fresh = sorted(set(split_of_both) - known)
            known |= set(fresh)
            for model, share in itertools.product(models, fresh):
                steps.append(_step(target, record, device, [(model, share)], [(b,) for b in alone]))
            for first, second in pairs:
                steps.append(_step(target, record, device, [*zip((first, second), split_of_both, strict=True)], batches))
        if mechanism == "mps":
            free = target.device("mps", oversubscribe=True)
            for model in models:
                steps.append(_step(target, record, device, [(model, 100.0)], [(b,) for b in alone]))
            for first, second in pairs:
                steps.append(_step(target, record, free, [(first, 100.0), (second, 100.0)], batches, "no caps"))
    record.run(steps)
    table = record.table("pairs")
    if table is not None:
        for name, rows in table.groupby("mechanism"):
            try:
                record.say(f"{name}: {fitted(rows)}")
            except ValueError as error:  # the call ended before the first pair
                record.say(f"{name}: nothing fitted: {error}")


def split(grid: Sequence[float], wanted: Sequence[float]) -> list[tuple[float, float]]:
    """Shares of the grid that are nearest to those wanted, each with the largest that fits beside it."""
    found: list[tuple[float, float]] = []
    for share in wanted:
        below = [g for g in grid if g < 100]
        if below:
            first = min(below, key=lambda g: (abs(g - share), g))
            found.append((first, max((g for g in below if g + first <= 100 + 1e-6), default=first)))
    return [both for both in dict.fromkeys(found) if sum(both) <= 100 + 1e-6]


def _step(
    target: Target,
    record: Record,
    device: Device,
    places: Sequence[tuple[str, float]],
    batches: Sequence[tuple[int, ...]],
    sharing: str = "",
) -> Step:
    sharing = sharing or ("alone" if len(places) == 1 else "shares")
    name = f"{device.name} {sharing} " + " beside ".join(f"{model} {share:g} %" for model, share in places)

    def work() -> dict[str, Any]:
        seconds, skews, rows = 0.6 if target.quick else WINDOW_S, [], []
        every = sorted({b for both in batches for b in both})
        with contextlib.ExitStack() as stack:
            workers = [stack.enter_context(device.start(m, share, batches=every)) for m, share in places]
            leases = device.leases()
            for worker in workers:
                worker.wait_ready(READY_S)
                leases.take(worker)
                worker.ask({"op": "warm", "batches": every}, READY_S)
            for both in batches:
                windows, skew_ms = together(workers, both, seconds)
                skews.append(skew_ms)
                rows += described(device.name, sharing, places, both, windows)
        record.add("pairs", pd.DataFrame(rows), name)
        return {"rows": len(rows), "skew_ms": max(skews), "marks": list(device.marks())}

    return Step(name, work, 40 if target.on_gpu else 15)


def together(workers: Sequence[Worker], batches: Sequence[int], seconds: float) -> tuple[list[np.ndarray], float]:
    """Let loaded workers serve batch after batch at the same time.

    All wait for a request: this is the barrier, which opens when the requests are written.

    Returns
    -------
    list of numpy.ndarray
        Service times [ms] of each worker within the part of the time in which all were busy.
    float
        How long writing the requests took [ms]: the most that one began later than another.
    """
    begin = time.monotonic()
    for worker, batch in zip(workers, batches, strict=True):
        worker.send({"op": "time", "batch": batch, "repeats": 1, "min_ms": 1e3 * seconds, "max_ms": 10e3 * seconds})
    skew_ms = (time.monotonic() - begin) * 1e3
    answers = []
    for worker in workers:
        answer = worker.receive(10 * seconds + 30)
        if answer is None or answer["reply"] != "time":
            raise RuntimeError(f"{worker!r}: {'no answer' if answer is None else answer.get('message', answer)}")
        answers.append(np.asarray(answer["samples_ms"], dtype=float))
    return inner(answers), skew_ms


def inner(samples: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Those samples of each that lie within the common time, less its head and tail; all began at once."""
    common = min(float(s.sum()) for s in samples)
    kept = []
    for s in samples:
        ends = np.cumsum(s)
        kept.append(s[(ends - s >= HEAD * common) & (ends <= (1 - TAIL) * common)])
    return kept


def described(
    mechanism: str, sharing: str, places: Sequence[tuple[str, float]], batches: Sequence[int], windows: Sequence[np.ndarray]
) -> list[dict[str, Any]]:
    """One row for each side: itself, what ran beside it, and its service time."""
    rows = []
    for i, ((model, share), batch, window) in enumerate(zip(places, batches, windows, strict=True)):
        row: dict[str, Any] = {"mechanism": mechanism, "sharing": sharing, "model": model, "batch": batch, "gpu_pct": share}
        other = 1 - i if len(places) == 2 else None
        row["beside"] = "" if other is None else places[other][0]
        row["beside_batch"] = 0 if other is None else batches[other]
        row["beside_pct"] = 0.0 if other is None else places[other][1]
        known = window.size > 0  # a batch longer than the window leaves none
        row["service_ms"] = float(np.median(window)) if known else np.nan
        row["p99_ms"] = float(np.quantile(window, 0.99)) if known else np.nan
        rows.append(row | {"repeats": int(window.size)})
    return rows
