"""Measure service times: sweep workers over batch and GPU%, and write down what spoils a number."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dstack_lab import zoo
from dstack_lab.checks import count, positive, require
from dstack_lab.devices.base import Device, Worker, WorkerDied, WorkerFailed, WorkerTimeout
from dstack_lab.devices.cpu import Cpu
from dstack_lab.files import whole_file
from dstack_lab.profiles import Profile
from dstack_lab.provenance import Provenance, today, versions_here

Point = dict[str, Any]

#: Two consecutive windows whose medians differ by less are the same number.
STABLE = 0.02
#: Below this part of the cores given, others used them too.
STARVED = 0.9
#: Fewer batches than this say little about a 99th percentile.
FEW = 10
NO_MEMORY = "out of memory"
#: Windows that fit into `seconds_per_point`.
WINDOWS = 6


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
) -> Profile:
    """Measure the service time of one batch, by network, batch and GPU%.

    Each network at each share gets a fresh worker process, one at a time. A point is warmed up,
    then timed in windows until the medians of two in a row agree within 2 %, or until
    `seconds_per_point` are over.

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

    Returns
    -------
    Profile
        Not strict. Columns: model, batch, gpu_pct; service_ms (median) and p99_ms of one batch;
        spread (interquartile range / median); repeats; effective_cores (processor time / time);
        mark (``""``, or of ``unstable``, ``starved``, ``few repeats``). A batch that does not
        fit into memory has no row; the provenance names it.

    Raises
    ------
    ValueError
        If a network is unknown, a batch is not 1 or more, or a share cannot be granted.
    RuntimeError
        If a point failed on two workers, naming network, share and batch.
    """
    device = Cpu() if device is None else device
    names = (models,) if isinstance(models, str) else tuple(models)
    require(len(names) > 0, "models", models, "1 or more names of networks")
    for name in names:
        own = isinstance(name, str) and ":" in name
        require(own or name in zoo.names(), "network", name, f"one of {', '.join(zoo.names())}, or {zoo.OWN}")
    batches = tuple(dict.fromkeys(count("batch", b) for b in batches))
    require(len(batches) > 0, "batches", batches, "1 or more")
    shares = _grantable(device, shares)
    limit_ms = 1e3 * positive("seconds_per_point", seconds_per_point)
    start = {"weights": weights, "seed": count("seed", seed, least=0), "memory_mib": memory_mib}
    positive("timeout_s", timeout_s)
    budget = None if budget is None else count("budget", budget, least=2)
    total = min(len(batches) * len(shares), budget or 10**9)
    marks = device.marks()
    path = None if folder is None else Path(folder) / "points.jsonl"
    rows: list[Point] = []
    with (
        _bar(progress, total * len(names)) as bar,
        contextlib.closing(_Bench(device, start, limit_ms, timeout_s, path, bar)) as bench,
    ):
        for name in names:
            if budget is None:
                rows += [bench.point(name, batch, share) for share in shares for batch in batches]
            else:
                found, doubt = _chosen(bench, name, batches, shares, budget, slo_ms)
                rows += found
                marks += (doubt,)
    return _profile(rows, device, marks)


class _Bench:
    """One worker at a time, kept while the same network is measured at the same share."""

    def __init__(self, device: Device, start: Point, limit_ms: float, timeout_s: float, path: Path | None, bar: Any) -> None:
        self.device, self.start, self.limit_ms, self.timeout_s = device, start, limit_ms, timeout_s
        self.path, self.bar = path, bar
        self.worker: Worker | None = None
        self.common = {"device": device.describe(), "mechanism": device.mechanism}
        self.common["versions"] = json.dumps(versions_here("torch", "torchvision"))
        self.known = {_key(p): p for p in _load(self.path)}

    def point(self, model: str, batch: int, share: float) -> Point:
        """Measure one point, on a second worker if the first fails; or return it if it was measured before."""
        point = {**self.common, "model": model, "batch": batch, "gpu_pct": share}
        if self.bar is not None:
            self.bar.set_description(f"{model} at {share:g} %, batch {batch}")
        if _key(point) not in self.known:
            point |= self._twice(model, batch, share)
            self.known[_key(point)] = point
            if self.path is not None and point["mark"] != NO_MEMORY:  # more memory may help next time
                _append(self.path, point)
        if self.bar is not None:
            self.bar.update()
        return self.known[_key(point)]

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
        windows: list[Point] = []
        stable, spent_ms = False, 0.0
        while len(windows) < 2 or not (stable or spent_ms >= self.limit_ms):
            windows.append(worker.ask(ask, self.timeout_s))
            spent_ms += windows[-1]["wall_ms"]
            last = [float(np.median(w["samples_ms"])) for w in windows[-2:]]
            stable = len(last) == 2 and abs(last[1] - last[0]) <= STABLE * last[1]
        used = windows[-2:] if stable else windows  # what came before was still settling
        cores = self.device.cores_for(share) if isinstance(self.device, Cpu) else None
        return _digest(used, stable, cores)

    def close(self) -> None:
        """End the worker."""
        worker, self.worker = self.worker, None
        if worker is not None:
            worker.kill()  # it holds nothing worth waiting for, and may be hung


def _digest(windows: list[Point], stable: bool, cores: int | None) -> Point:
    samples = np.concatenate([w["samples_ms"] for w in windows])
    low, median, high, p99 = np.quantile(samples, [0.25, 0.5, 0.75, 0.99])
    effective = sum(w["cpu_ms"] for w in windows) / sum(w["wall_ms"] for w in windows)
    marks = [] if stable else ["unstable"]
    marks += ["starved"] if cores is not None and effective < STARVED * cores else []
    marks += ["few repeats"] if len(samples) < FEW else []
    return {
        "service_ms": float(median),
        "p99_ms": float(p99),
        "spread": float((high - low) / median),
        "repeats": len(samples),
        "effective_cores": effective,
        "mark": ", ".join(marks),
    }


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
    for name in ("unstable", "starved", "few repeats"):
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


def _key(point: Point) -> str:
    parts = [point[name] for name in ("model", "batch", "gpu_pct", "device", "mechanism", "versions")]
    return json.dumps(parts)


def _load(path: Path | None) -> list[Point]:
    """Read the points of earlier calls; a last line cut short by a crash is measured again."""
    if path is None or not path.is_file():
        return []
    points = []
    *lines, rest = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            points.append(json.loads(line))
            _key(points[-1])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"line {number} of {path.name}: must be a point ({error}); remove it to measure again") from error
    if rest:
        with whole_file(path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return points


def _append(path: Path, point: Point) -> None:
    """Add one whole line, on the disk before the next point begins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab", buffering=0) as out:
        out.write(json.dumps(point).encode() + b"\n")
        os.fsync(out.fileno())


def _bar(progress: bool, total: int) -> Any:
    """Return a progress bar, or None: a bare GPU server may lack tqdm."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return contextlib.nullcontext()
    return tqdm(total=total, unit="point", disable=not progress)
