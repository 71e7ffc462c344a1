"""Measure service times: sweep workers over batch and GPU%, and write down what spoils a number."""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from dstack_lab import zoo
from dstack_lab.checks import count, positive, require
from dstack_lab.devices.base import Device, Worker, WorkerDied, WorkerFailed, WorkerTimeout
from dstack_lab.devices.cpu import Cpu
from dstack_lab.points import FEW, Point, append_point, digest, fed, key_of, load_points, settled, starved, width
from dstack_lab.profiles import Profile
from dstack_lab.progress import progress_bar
from dstack_lab.provenance import Provenance, today, versions_here

NO_MEMORY = "out of memory"
#: Windows that fit into `seconds_per_point`.
WINDOWS = 6
#: So much longer a point may take if its worker has not had its one core by then.
PATIENCE = 2


def measure(
    models: str | Sequence[str],
    device: Device | None = None,
    batches: Sequence[int] = (1, 2, 4, 8),
    shares: Sequence[float] | None = None,
    budget: int | None = None,
    *,
    progress: bool = True,
    seconds_per_point: float = 3.0,
    seed: int = 0,
    weights: str | None = None,
    folder: str | os.PathLike[str] | None = None,
    memory_mib: float | None = None,
    slo_ms: float | None = None,
    timeout_s: float = 300.0,
    budget_s: float | None = None,
    interval: float | None = None,
) -> Profile:
    """Measure the service time of one batch, by network, batch and GPU%.

    Each network at each share gets a fresh worker process, one at a time. A point is warmed up,
    then timed in windows until the medians of two in a row agree within 2 %, or until
    `seconds_per_point` are over. Windows in which others used the worker's cores are left out if there
    are better ones; to find some, a point on one core may take twice as long.

    Parameters
    ----------
    models : str or sequence of str
        Names of `dstack_lab.zoo`, or networks of one's own (``"file.py:function"``).
    device : Device, optional
        Where to measure; ``Cpu()`` by default.
    batches : sequence of int
        Batches to time, each 1 or more.
    shares : sequence of float, optional
        GPU% to time; all that the device can grant by default.
    budget : int, optional
        Points to measure per network, 2 or more, each chosen where it tells most about the knee.
        All of batches x shares by default. The provenance then says how sure that is.
    progress : bool
        Show a bar, if tqdm is installed.
    seconds_per_point : float
        Limit of one point's timing, above 0; a batch that takes longer is still timed twice.
    seed : int
        Of weights and inputs.
    weights : {None, "DEFAULT"}
        Random or trained weights; timing does not depend on them.
    folder : path, optional
        Keeps each finished point in ``points.jsonl`` there; a later call skips the points it finds.
    memory_mib : float, optional
        MiB that serving may allocate beyond the loaded network.
    slo_ms : float, optional
        For `budget`: points far slower than this matter less.
    timeout_s : float
        A worker silent for longer counts as hung.
    budget_s : float, optional
        No point is begun later than this after the call [s]. A mark ``time budget`` then says how many
        points are left; with `folder`, the same call again goes on there.
    interval : float, optional
        Goes on until the 95 % confidence interval of the median is narrower than this part of the median too, such as
        0.01, or until `seconds_per_point` are over.

    Returns
    -------
    Profile
        Not strict. Columns: model, batch, gpu_pct; service_ms (median) of one batch; low_ms and high_ms (95 % confidence
        interval of the median, see `points.median_interval`; NaN if repeats are too few); p99_ms; spread
        (interquartile range / median); repeats; effective_cores (processor time / time); core_ms (on one core:
        processor time of a batch, mean); mark (``""``, or of ``unstable``, ``wide interval``,
        ``starved``, ``few repeats``, ``throttled``). On a GPU also
        effective_sms (granted), gpu_ms (median by the GPU's clock), clock_mhz (SMs), power_w. A batch
        that does not fit into memory has no row; the provenance names it.

    Raises
    ------
    ValueError
        If a network is unknown, a batch is not 1 or more, or a share cannot be granted.
    RuntimeError
        If a point failed on two workers, naming network, share and batch.
    """
    device = Cpu() if device is None else device
    require(hasattr(device, "start"), "device", device, "a device such as devices.Cpu()")
    names = (models,) if isinstance(models, str) else tuple(models)
    require(len(names) > 0, "models", models, "1 or more names of networks")
    for name in names:
        own = isinstance(name, str) and ":" in name
        require(own or name in zoo.names(), "network", name, f"one of {', '.join(zoo.names())}, or {zoo.OWN}")
    batches = tuple(dict.fromkeys(count("batch", b) for b in batches))
    require(len(batches) > 0, "batches", batches, "1 or more")
    shares = _grantable(device, shares)
    limit_ms = 1e3 * positive("seconds_per_point", seconds_per_point)
    interval = None if interval is None else positive("interval", interval)
    start = {"weights": weights, "seed": count("seed", seed, least=0), "memory_mib": memory_mib}
    positive("timeout_s", timeout_s)
    end = math.inf if budget_s is None else time.monotonic() + positive("budget_s", budget_s)
    budget = None if budget is None else count("budget", budget, least=2)
    total = min(len(batches) * len(shares), budget or 10**9)
    marks = device.marks()
    path = None if folder is None else Path(folder) / "points.jsonl"
    rows: list[Point] = []
    done = 0
    with (
        progress_bar(progress, total * len(names), "Measuring", "point") as bar,
        contextlib.closing(_Bench(device, start, limit_ms, interval, timeout_s, path, bar)) as bench,
    ):
        for name in names:
            if budget is None:
                for share, batch in [(share, batch) for share in shares for batch in batches]:
                    if time.monotonic() < end or bench.knows(name, batch, share):
                        rows.append(bench.point(name, batch, share))
            elif time.monotonic() < end:
                done += 1
                found, doubt = _chosen(bench, name, batches, shares, budget, slo_ms)
                rows += found
                marks += (doubt,)
    left = total * len(names) - len(rows) if budget is None else len(names) - done
    if left:
        what = f"{left} of {total * len(names)} points" if budget is None else f"{left} of {len(names)} networks"
        again = "call again with the same folder" if path is not None else "pass folder= to be able to go on"
        marks += (f"time budget: {what} are left after {budget_s:g} s: {again}",)
        if not rows:
            raise RuntimeError(f"no point could be measured: {marks[-1]}")
    return _profile(rows, device, marks)


class _Bench:
    """One worker at a time, kept while the same network is measured at the same share."""

    def __init__(
        self,
        device: Device,
        start: Point,
        limit_ms: float,
        interval: float | None,
        timeout_s: float,
        path: Path | None,
        bar: Any,
    ) -> None:
        self.device, self.start, self.limit_ms, self.interval, self.timeout_s = device, start, limit_ms, interval, timeout_s
        self.path, self.bar = path, bar
        self.worker: Worker | None = None
        self.common = {"device": device.describe(), "mechanism": device.mechanism}
        self.common["versions"] = json.dumps(versions_here("torch", "torchvision"))
        self.known = {key_of(p): p for p in load_points(self.path)}

    def point(self, model: str, batch: int, share: float) -> Point:
        """Measure one point, on a second worker if the first fails; or return it if it was measured before."""
        point = {**self.common, "model": model, "batch": batch, "gpu_pct": share}
        self.bar.set_description_str(f"{model} at {share:g} %, batch {batch}")
        if key_of(point) not in self.known:
            point |= self._twice(model, batch, share)
            self.known[key_of(point)] = point
            if self.path is not None and point["mark"] != NO_MEMORY:  # more memory may help next time
                append_point(self.path, point)
        self.bar.update()
        return self.known[key_of(point)]

    def knows(self, model: str, batch: int, share: float) -> bool:
        """Whether a point was measured before."""
        return key_of({**self.common, "model": model, "batch": batch, "gpu_pct": share}) in self.known

    def _twice(self, model: str, batch: int, share: float) -> Point:
        for last in (False, True):
            try:
                return self._time(model, batch, share)
            except (WorkerDied, WorkerTimeout, WorkerFailed) as error:
                self.close()
                if isinstance(error, WorkerFailed) and error.kind == "out_of_memory":
                    break
                if last:
                    where = f"{model} at {share:g} %, batch {batch}"
                    raise RuntimeError(f"measuring {where} failed on two workers: {error}") from error
        return {"service_ms": float("nan"), "mark": NO_MEMORY}

    def _time(self, model: str, batch: int, share: float) -> Point:
        if self.worker is None or (self.worker.model, self.worker.gpu_pct) != (model, share):
            self.close()
            self.worker = self.device.start(model, share, **self.start)
            self.worker.wait_ready(self.timeout_s)
        worker = self.worker
        worker.ask({"op": "warm", "batches": [batch], "repeats": 2}, self.timeout_s)
        window_ms = self.limit_ms / WINDOWS
        ask = {"op": "time", "batch": batch, "repeats": FEW // 2, "min_ms": window_ms, "max_ms": 2 * window_ms}
        cores_for = getattr(self.device, "cores_for", None)
        cores = None if cores_for is None else cores_for(share)
        windows: list[Point] = []
        spent_ms = 0.0
        while True:
            windows.append(self._window(worker, ask))
            spent_ms += windows[-1]["wall_ms"]
            good = fed(windows, cores)
            used = settled(good)
            stable = len(used) > 1
            hungry = cores == 1 and starved(used, cores)  # several threads may wait for each other, not for cores
            if stable and not hungry and (self.interval is None or width(used) <= self.interval):
                break
            if len(windows) > 1 and spent_ms >= self.limit_ms * (PATIENCE if hungry else 1):
                break
        used = used if stable else good  # what came before was still settling
        granted = getattr(worker, "granted_sms", None)
        return digest(used, stable, cores, self.interval) | ({} if granted is None else {"effective_sms": granted})

    def _window(self, worker: Worker, ask: Point) -> Point:
        """Time one window; on a GPU say at what clock and power, read in its middle: an idle GPU's say nothing."""
        look = getattr(self.device, "conditions", None)
        if look is None:
            return worker.ask(ask, self.timeout_s)
        seen: list[Point] = []
        reader = threading.Timer(ask["min_ms"] / 2e3, lambda: seen.append(look()))
        reader.start()
        try:
            window = worker.ask(ask, self.timeout_s)
        finally:
            reader.cancel()
            reader.join()
        return window | (seen[-1] if seen else {})

    def close(self) -> None:
        """End the worker."""
        worker, self.worker = self.worker, None
        if worker is not None:
            worker.kill()  # it holds nothing worth waiting for, and may be hung


def _chosen(
    bench: _Bench, model: str, batches: tuple[int, ...], shares: tuple[float, ...], budget: int, slo_ms: float | None
) -> tuple[list[Point], str]:
    """Let `active.choose_points` say where to measure next, and how sure it is in the end."""
    from dstack_lab import active  # brings scipy along, which plain sweeps need not

    rows: dict[tuple[int, float], Point] = {}

    def look(batch: int, gpu_pct: float) -> float:
        row = rows[int(batch), float(gpu_pct)] = bench.point(model, int(batch), float(gpu_pct))
        return float(row["service_ms"])

    choice = active.choose_points(look, batches, shares, budget, slo_ms)
    return list(rows.values()), f"budget: {model}: {choice}"


def _profile(rows: list[Point], device: Device, marks: tuple[str, ...]) -> Profile:
    """Make the table, and say in the provenance what is wrong with it."""
    table = pd.DataFrame(rows).drop(columns=["device", "mechanism", "versions"])
    for name in ("unstable", "wide interval", "starved", "few repeats", "throttled"):
        hit = int(table["mark"].str.contains(name).sum())
        marks += (f"{name}: {hit} of {len(table)} points",) if hit else ()
    missing = table[table["mark"] == NO_MEMORY]
    marks += tuple(f"out of memory: {r.model} at {r.gpu_pct:g} %, batch {r.batch}" for r in missing.itertuples(index=False))
    known = {mark.split(":")[0] for mark in marks}
    marks += tuple(mark for mark in device.marks() if mark.split(":")[0] not in known)  # what began while measuring
    table = table.drop(index=missing.index)
    if table.empty:
        raise RuntimeError(f"no point could be measured: {'; '.join(marks)}")
    versions = versions_here("dstack-lab", "torch", "torchvision", "numpy")
    return Profile(table, Provenance("measured", device.describe(), device.mechanism, versions, today(), marks), strict=False)


def _grantable(device: Device, shares: Sequence[float] | None) -> tuple[float, ...]:
    grid = device.shares()
    if shares is None:
        return grid
    near = {share: min(grid, key=lambda g: abs(g - share)) for share in shares}
    require(len(near) > 0, "shares", tuple(shares), "1 or more GPU%")
    for share, granted in near.items():
        allowed = f"one that {device.describe()} can grant: {', '.join(f'{g:g}' for g in grid)}"
        require(abs(granted - share) <= 0.05, "share", share, allowed)
    return tuple(dict.fromkeys(near.values()))
