"""Run a policy on real workers and the wall clock: the same policy objects, the same `Trace`."""

from __future__ import annotations

import contextlib
import gc
import select
import time
from collections.abc import Callable
from dataclasses import replace
from heapq import heappop
from typing import Any

import numpy as np
import pandas as pd

from dstack_lab.checks import positive, require
from dstack_lab.devices import Cpu
from dstack_lab.devices.base import Device, WorkerDied, WorkerTimeout
from dstack_lab.fleet import Fleet, Member
from dstack_lab.ledger import Ledger, PolicyError
from dstack_lab.policies.base import Policy
from dstack_lab.progress import progress_bar
from dstack_lab.protocol import Message
from dstack_lab.provenance import Provenance, today, versions_here
from dstack_lab.recipes import recipe_of
from dstack_lab.services import Plan
from dstack_lab.simulator import open_ledger
from dstack_lab.state import NEVER_NS, NS_PER_MS, Drop, Launch
from dstack_lab.traces import SAMPLES, Trace
from dstack_lab.turns import RuleBroken, Turns

#: A launch is hung after this many times its predicted service time, and at least `HUNG_MS`.
HUNG_TIMES, HUNG_MS = 20, 3000.0
#: Longest sleep of the loop, so that hung workers are noticed.
NAP_S = 0.25


def run(
    plan: Plan,
    policy: Policy,
    device: Device | None = None,
    duration_ms: float = 10_000.0,
    seed: int = 0,
    *,
    drain_ms: float | None = None,
    progress: bool = False,
    start_timeout_s: float = 300.0,
    hung_ms: float = HUNG_MS,
    options: dict[str, Any] | None = None,
    watch: Callable[[Ledger], bool] | None = None,
) -> Trace:
    """Run `policy` on `plan` for real.

    Requests arrive open-loop at the times `simulate` would use for the same seed. Each has an input of
    its own and gets the network's answer. A worker that dies, hangs or runs out of memory is
    replaced, and its batch tried once more; after a second failure its requests are dropped.

    Parameters
    ----------
    plan : Plan
        Made from a profile of this device.
    policy : Policy
    device : Device, optional
        `Cpu()` by default.
    duration_ms : float
        Requests arrive in [0, duration_ms).
    seed : int
        Of arrivals, weights and inputs.
    drain_ms : float, optional
        How long to go on after the last arrival; as long as `duration_ms` by default. What waits
        then is ``unserved`` in the trace.
    progress : bool
        Show a progress bar.
    start_timeout_s : float
        How long workers may take to load [s].
    hung_ms : float
        Least time after which a launch without an answer counts as hung [ms].
    options : dict, optional
        Further arguments of ``device.start``, such as ``memory_mib``.
    watch : callable, optional
        Shown the run's books some times a second; returns whether to go on. It holds up the run while it looks.

    Returns
    -------
    Trace
        As `simulate` returns, with the columns ``answer`` (class of each request's answer, -1 if
        none) and ``score`` (mean of its output) beside each request, and faults in ``events``. Beside
        each launch, as far as its worker told: ``effective_sms`` (SMs really granted), ``worker_ms``
        (service by the worker's own clock: ``end_ms - start_ms - worker_ms`` is the cost of dispatch),
        ``gpu_ms`` (by the GPU's clock) and ``path`` (``graph``: a CUDA graph was replayed; ``padded``:
        that of a larger batch; ``eager``: none, which is also an event unless the device wants it so).

    Raises
    ------
    ValueError
        If an argument is out of range or the device cannot grant a share.
    PolicyError
        If the policy breaks a rule; its ``trace`` holds the run so far.
    """
    device = Cpu() if device is None else device
    require(isinstance(device, Device), "device", device, "a device such as devices.Cpu()")
    drain_ms = duration_ms if drain_ms is None else positive("drain_ms", drain_ms)
    recipe = recipe_of(plan, policy)
    ledger = open_ledger(plan, policy, duration_ms, seed)
    with Fleet(device, plan, policy.shares(plan), seed, options) as fleet:
        with progress_bar(progress, len(fleet.members), "Starting workers", "worker") as bar:
            fleet.wait_ready(start_timeout_s, bar.update)
        marks = device.marks()
        session = _Run(ledger, policy, fleet, device, hung_ms)
        session.watch = watch
        error: RuleBroken | None = None
        sampler = device.sampler() if hasattr(device, "sampler") else None
        gc.disable()  # a collection stops the loop for tens of milliseconds
        try:
            with (
                sampler or contextlib.nullcontext(),
                progress_bar(progress, round(duration_ms / 1000, 1), policy.name, "s") as bar,
            ):
                session.loop(round(duration_ms * NS_PER_MS), round(drain_ms * NS_PER_MS), bar)
        except RuleBroken as broken:
            error = broken
        finally:
            gc.enable()
    versions = versions_here("dstack-lab", "torch", "numpy")
    provenance = Provenance("measured", device.describe(), device.mechanism, versions, today(), marks)
    trace = replace(ledger.to_trace(duration_ms, policy.name, seed, provenance), recipe=recipe)
    _annotate(trace, session.told)
    if sampler is not None and sampler.samples:
        samples = pd.DataFrame(sampler.samples)[list(SAMPLES)]
        trace = replace(trace, samples=samples.assign(time_ms=samples["time_ms"] - session.start_ns / NS_PER_MS))
    trace.requests["answer"] = np.concatenate(session.answers)
    trace.requests["score"] = np.concatenate(session.scores)
    if error is not None:
        raise PolicyError(str(error), trace) from error.__cause__
    return trace


class _Run:
    """State of one run's loop."""

    watch: Callable[[Ledger], bool] | None = None

    def __init__(self, ledger: Ledger, policy: Policy, fleet: Fleet, device: Device, hung_ms: float) -> None:
        self.ledger, self.policy, self.fleet = ledger, policy, fleet
        self.device, self.leases = device, device.leases()
        self.hung_ns = round(hung_ms * NS_PER_MS)
        self.answers = [np.full(times.size, -1, dtype=np.int64) for times in ledger.arrivals_ns]
        self.scores = [np.full(times.size, np.nan) for times in ledger.arrivals_ns]
        self.told: dict[int, Message] = {}  # launch -> what its worker said about it
        self.slow_paths: set[tuple[str, float, int]] = set()
        self.doubted: dict[str, int] = {}  # service -> end of the range of requests whose batch failed once
        self.state = ledger.state

    def loop(self, duration_ns: int, drain_ns: int, bar: Any) -> None:
        """Serve until every request is served or dropped, or the drain time is over."""
        self.turns = Turns(self.ledger, self.policy, self._launch)
        heap, state, start = self.turns.heap, self.state, time.monotonic_ns()
        self.start_ns, last_s, watched_ns = start, 0.0, 0
        while self.ledger.waiting_total or state._running:
            upcoming = heap[0][0] if heap else NEVER_NS
            nap = min(NAP_S, max(0.0, (upcoming - (time.monotonic_ns() - start)) * 1e-9))
            readable = select.select(list(self.fleet.by_fd), [], [], nap)[0]
            state.now_ns = now = time.monotonic_ns() - start
            if now > duration_ns + drain_ns:
                self._event("stopped", "", f"{self.ledger.waiting_total} requests still waited at the end of the drain time")
                break
            if self.watch is not None and now - watched_ns > NAP_S * 1e9:
                watched_ns = now
                if not self.watch(self.ledger):
                    self._event("stopped", "", "by hand")
                    break
            ask = False
            for fd in readable:
                ask = self._hear(self.fleet.by_fd[fd]) or ask
            ask = self._find_hung(now) or ask
            while heap and heap[0][0] <= now:
                _, kind, key = heappop(heap)
                ask = self.turns.happen(now, kind, key) or ask
            if ask:
                self.turns.take()
            if now * 1e-9 - last_s > 0.1 and now < duration_ns:
                bar.update(round(now * 1e-9 - last_s, 1))
                last_s += round(now * 1e-9 - last_s, 1)

    def _launch(self, number: int, end: int, launch: Launch) -> None:
        """Hand a launch to its worker."""
        member = self.fleet.members.get((launch.service, launch.gpu_pct))
        if member is None:
            prepared = [m.gpu_pct for m in self.fleet.of(launch.service)]
            raise ValueError(f"gpu_pct must be one of the prepared shares {prepared}: name more in the policy's shares()")
        if member.launch >= 0:
            raise ValueError(f"{launch.service} runs a batch at {launch.gpu_pct:g} % already: one launch at a time and share")
        view = self.state.by_name[launch.service]
        now = self.state.now_ns
        member.launch = number
        member.overdue_ns = now + max(self.hung_ns, HUNG_TIMES * (end - now))
        self.leases.take(member.worker)
        first = view._head - launch.batch
        with contextlib.suppress(WorkerDied, WorkerTimeout):  # its descriptor is readable then, or it is overdue soon
            member.worker.send({"op": "run", "id": number, "inputs": list(range(first, first + launch.batch))})

    def _hear(self, member: Member) -> bool:
        """Take a worker's messages; return whether the policy has to be asked."""
        try:
            messages = member.worker.poll()
        except WorkerDied as death:
            self._fail(member, "worker died", str(death))
            return True
        ask = False
        for message in messages:
            reply = message["reply"]
            if reply == "run":
                self._answer(member, message)
                ask = True
            elif reply == "ready":
                member.ready, member.starts = True, 0
                self._event("worker ready", member.service, f"pid {member.worker.pid}")
                ask = self._show(member.service) or ask
            else:  # error or failed
                self._fail(member, str(message.get("error", reply)).replace("_", " "), str(message.get("message", "")))
                return True
        return ask

    def _answer(self, member: Member, message: Message) -> None:
        """Book a finished launch; an answer is written once."""
        number, outputs = message["id"], message["outputs"]
        view, _, batch, _, _ = self.state._running[number]
        first = self.ledger.first_of(number)
        rows = slice(first, first + batch)
        if len(outputs) != batch or (self.answers[view.index][rows] != -1).any():
            raise RuntimeError(
                f"launch {number} of {member.service}: {len(outputs)} answers to {batch} requests, or answered twice"
            )
        self.answers[view.index][rows] = [answer for answer, _ in outputs]
        self.scores[view.index][rows] = [score for _, score in outputs]
        member.launch = -1
        self.leases.give(member.worker)
        self.ledger.finish(number, self.state.now_ns)
        self._note(number, member, batch, message)

    def _note(self, number: int, member: Member, batch: int, message: Message) -> None:
        """Keep what the worker told about a launch; a slow path is news the first time."""
        granted = message.get("granted_sms", getattr(member.worker, "granted_sms", None))
        path = message.get("path", "")
        gpu_ms = message.get("gpu_ms")
        self.told[number] = {"effective_sms": granted, "worker_ms": message["service_ms"], "gpu_ms": gpu_ms, "path": path}
        seen = (member.service, member.gpu_pct, batch)
        if path in ("eager", "padded") and getattr(self.device, "graphs", True) and seen not in self.slow_paths:
            self.slow_paths.add(seen)
            how = "ran eagerly" if path == "eager" else "was filled up to a larger one"
            self._event(
                "no graph", member.service, f"batch {batch} at {member.gpu_pct:g} % {how}: no CUDA graph of its own there"
            )

    def _find_hung(self, now: int) -> bool:
        hung = [m for m in self.fleet.members.values() if m.launch >= 0 and now > m.overdue_ns]
        for member in hung:
            self._fail(member, "worker hung", f"no answer for {(now - self.state._running[member.launch][3]) / NS_PER_MS:.0f} ms")
        return bool(hung)

    def _fail(self, member: Member, kind: str, detail: str) -> None:
        """Put a failed batch back or, the second time, drop it; start another worker meanwhile."""
        self._event(kind, member.service, detail)
        view = self.state.by_name[member.service]
        self.leases.give(member.worker)
        self.ledger.show(view)
        if member.launch >= 0:
            first, end = self.ledger.requeue(member.launch)
            lost = min(self.doubted.get(member.service, 0), end) - first
            if lost > 0:
                self.ledger.drop(Drop(member.service, lost))
                self._event("gave up", member.service, f"{lost} requests failed twice and were dropped")
            else:
                self._event("retried", member.service, f"{end - first} requests wait for a fresh worker")
            self.doubted[member.service] = end
        self.ledger.hide(view)
        if not self.fleet.replace(member):
            self._event("gave up", member.service, "its workers do not start; its requests are dropped as they come")
            self.ledger.abandon(view)

    def _show(self, service: str) -> bool:
        """Let the policy see a service again once all its workers are there."""
        if not all(member.ready for member in self.fleet.of(service)):
            return False
        view = self.state.by_name[service]
        self.ledger.show(view)
        self.turns.expect(view)
        return True

    def _event(self, kind: str, service: str, detail: str) -> None:
        self.ledger.events.append((self.state.now_ns / NS_PER_MS, kind, service, detail))


def _annotate(trace: Trace, told: dict[int, Message]) -> None:
    """Add columns about each launch, those that any worker had something to say about."""
    number = trace.launches["launch"]
    for column, missing in (("effective_sms", np.nan), ("worker_ms", np.nan), ("gpu_ms", np.nan), ("path", "")):
        values = [told.get(n, {}).get(column) for n in number]
        if any(value not in (None, "") for value in values):
            trace.launches[column] = [missing if value is None else value for value in values]
