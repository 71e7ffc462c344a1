"""Item 6: a service's share changes under load: how long it is served by nobody, and what that costs its requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from dstack_lab.agenda.record import Record, Step
from dstack_lab.agenda.target import CPU_MODELS, Target
from dstack_lab.arrivals import Poisson
from dstack_lab.bounds import service_tables
from dstack_lab.checks import require
from dstack_lab.devices import Device
from dstack_lab.policies.base import GpuState, Launch, Policy
from dstack_lab.profiler import measure
from dstack_lab.runner import run as run_for_real
from dstack_lab.services import Allocation, Plan, Service
from dstack_lab.traces import Trace

MODELS = ("resnet50", "vgg19", "mobilenet_v2")
#: Shares to change between, whose workers can run side by side; the device's nearest are taken.
LOW, HIGH = 40, 60
BATCHES = (1, 4, 8)
#: Part of what can be served at the lower share; SLO in service times of the largest batch there.
LOAD, SLO_TIMES = 0.6, 4
#: Longest wait for the workers of a run [s].
START_S = 120.0
#: Requests that come up to this long after a switch count as those that it may have delayed [ms].
AFTER_MS = 500.0


class Resizes(Policy):
    """One service that is served at one share, then at the other, and so on.

    Parameters
    ----------
    low, high : float
        GPU%, the lower one first.
    times_ms : sequence of float
        When the share changes [ms], ascending.
    ahead : bool
        Whether a runner that starts standbys shall have both shares ready before the run.
    """

    def __init__(self, low: float, high: float, times_ms: Sequence[float], ahead: bool = True) -> None:
        self.both, self.times_ms, self.ahead = (low, high), tuple(times_ms), ahead

    def decide(self, state: GpuState) -> list[Launch]:
        """Launch what waits, at the share of the time."""
        share = self.both[sum(t <= state.now_ms for t in self.times_ms) % 2]
        ready = [view for view in state.services if view.ready and not view.in_flight]
        return [Launch(view.name, share, view.queued(view.batch)) for view in ready]

    def shares(self, plan: Plan) -> dict[str, tuple[float, ...]]:
        """Both."""
        return {a.service: self.both for a in plan.allocations}

    def first_shares(self, plan: Plan) -> dict[str, tuple[float, ...]]:
        """Both, or the first alone: the other's worker is then started when it is asked for."""
        return {a.service: self.both if self.ahead else self.both[:1] for a in plan.allocations}


def run(target: Target, record: Record) -> None:
    """Switch each network on each mechanism: between shares that are ready, and to a standby that has to start."""
    steps = []
    for mechanism in target.mechanisms:
        ways = ["ready"]
        starts_standbys = not getattr(target.device(mechanism), "prepares_all", False)
        if starts_standbys and (target.on_gpu or not target.quick):  # takes ten seconds on a busy machine
            ways.append("standby")
        models = CPU_MODELS[:1] if not target.on_gpu else MODELS[:1] if target.quick else MODELS
        steps += [
            Step(f"{mechanism} {way} {model}", _unit(target, record, mechanism, way, model), 30 if target.quick else 90)
            for model in models
            for way in ways
        ]
    record.run(steps)


def _unit(target: Target, record: Record, mechanism: str, way: str, model: str) -> Any:
    def work() -> dict[str, Any]:
        device = target.device(mechanism)
        low, high = near(device.shares())
        plan = plan_of(device, model, low, high, *((BATCHES[:2], 0.2) if target.quick else (BATCHES, 1.0)))
        # a standby takes as long to start as a process and its CUDA do
        seconds = (4.0 if target.quick else 20.0) if way == "ready" else (15.0 if target.quick else 40.0)
        parts = (0.2, 0.4, 0.6, 0.8) if way == "ready" else (0.2,)
        times_ms = [1000 * seconds * part for part in parts]
        policy = Resizes(low, high, times_ms, way == "ready")
        trace = run_for_real(plan, policy, device, 1000 * seconds, seed=1, start_timeout_s=START_S)
        found = switches(trace, model, times_ms)
        require(len(found) > 0, "switches", 0, f"1 or more within {seconds:g} s: no batch ran at the other share")
        head: dict[str, Any] = {"mechanism": mechanism, "way": way, "model": model}
        record.add("switches", found.assign(**head)[[*head, *found.columns]], f"{mechanism} {way} {model}")
        middle = found[["gap_us", "usual_gap_us", "delay_ms", "late", "requests", "usual_late"]].mean().to_dict()
        events = trace.events["kind"].value_counts().to_dict()
        return {"switches": len(found), "of": len(times_ms), "events": events} | {str(k): v for k, v in middle.items()}

    return work


def near(grid: Sequence[float]) -> tuple[float, float]:
    """Two different shares of the grid, nearest to those wanted.

    Raises
    ------
    ValueError
        If there is only one.
    """
    require(len(grid) > 1, "shares of the device", tuple(grid), "2 or more: with one, nothing can be resized")
    low = min(grid[:-1], key=lambda g: abs(g - LOW))
    return low, min([g for g in grid if g > low], key=lambda g: abs(g - HIGH))


def plan_of(device: Device, model: str, low: float, high: float, batches: Sequence[int], point_s: float) -> Plan:
    """Measure a network at both shares, and offer it a load that it can serve at the lower one."""
    profile = measure(model, device, batches, [low, high], progress=False, seconds_per_point=point_s)
    table = service_tables([Service(model, 1e6, Poisson(1.0))], profile)[0]
    batch = table.batch_max
    slow_ms = table.at(batch, low)
    rate = LOAD * 1000 * batch / slow_ms
    service = Service(model, SLO_TIMES * slow_ms, Poisson(rate))
    at = Allocation(model, low, batch, slow_ms, rate)
    return Plan((service,), (at,), (table,), (low, high), "resize", profile.provenance)


def switches(trace: Trace, service: str, asked_ms: Sequence[float]) -> pd.DataFrame:
    """One row for each change of share that took place.

    A gap is the time from when a launch could have begun (its oldest request is there, the launch before it has
    ended) to when it began: nothing runs although something waits.

    Returns
    -------
    pandas.DataFrame
        ``asked_ms`` (last time before it that the share was to change), ``from_pct``, ``to_pct``, ``first_ms`` (start of the
        first launch at the new share), ``delay_ms`` (first less asked), ``gap_us`` and ``usual_gap_us`` (median of all
        launches that did not switch), ``dispatch_us`` (of the first launch: time that its worker did not compute in, NaN
        if not told) and ``usual_dispatch_us``, ``requests`` (that came from when it was asked for to 500 ms after) and
        ``late`` (those of them that missed the SLO), ``usual_late`` (part of all other requests that did, 0 to 1).
    """
    runs = trace.launches[trace.launches["service"].astype(str) == service].sort_values("start_ms").reset_index(drop=True)
    mine = trace.requests[trace.requests["service"].astype(str) == service]
    slo_ms = float(trace.services.loc[trace.services["service"].astype(str) == service, "slo_ms"].iloc[0])
    late = ~(mine["finish_ms"] - mine["arrival_ms"] <= slo_ms + 1e-9)
    oldest = runs["launch"].map(mine[mine["launch"] >= 0].groupby("launch")["arrival_ms"].min())
    before = np.maximum(runs["end_ms"].shift(), oldest)
    gaps_us = 1000 * (runs["start_ms"] - before)
    worked = runs.get("worker_ms", np.nan)
    dispatch_us = 1000 * (runs["end_ms"] - runs["start_ms"] - worked)
    changed = runs["gpu_pct"].ne(runs["gpu_pct"].shift()) & (runs.index > 0)
    spans = []
    for i in np.flatnonzero(changed):
        first = float(runs["start_ms"][i])
        asked = max((t for t in asked_ms if t <= first), default=first)
        spans.append((int(i), asked, first, mine["arrival_ms"].between(asked, first + AFTER_MS)))
    outside = ~np.logical_or.reduce([inside.to_numpy() for *_, inside in spans]) if spans else np.ones(len(mine), dtype=bool)
    rows = [
        {
            "asked_ms": asked,
            "from_pct": float(runs["gpu_pct"][i - 1]),
            "to_pct": float(runs["gpu_pct"][i]),
            "first_ms": first,
            "delay_ms": first - asked,
            "gap_us": float(gaps_us[i]),
            "usual_gap_us": float(gaps_us[~changed].median()),
            "dispatch_us": float(dispatch_us[i]),
            "usual_dispatch_us": float(dispatch_us[~changed].median()),
            "requests": int(inside.sum()),
            "late": int(late[inside].sum()),
            "usual_late": float(late[outside].mean()),
        }
        for i, asked, first, inside in spans
    ]
    return pd.DataFrame(rows)
