"""Run a policy on real workers and the wall clock: the same policy objects, the same `Trace`."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from dstack_lab.checks import count, positive, require
from dstack_lab.devices import Cpu
from dstack_lab.devices.base import Device
from dstack_lab.fleet import Fleet
from dstack_lab.helper import Helper
from dstack_lab.ledger import Ledger, PolicyError
from dstack_lab.points import STARVED
from dstack_lab.policies.base import Policy
from dstack_lab.progress import progress_bar
from dstack_lab.protocol import Message
from dstack_lab.provenance import Provenance, today, versions_here
from dstack_lab.recipes import recipe_of
from dstack_lab.services import Plan
from dstack_lab.session import HUNG_MS, FleetLost, Session
from dstack_lab.simulator import open_ledger
from dstack_lab.state import NS_PER_MS
from dstack_lab.traces import SAMPLES, Trace
from dstack_lab.turns import RuleBroken

#: Longest that the loop waits for the thread that samples or starts workers to let go of the interpreter [s].
SWITCH_S = 2e-4


class RunError(RuntimeError):
    """The device failed for good in the middle of a run.

    Parameters
    ----------
    message : str
        What failed, and the cure.
    trace : Trace
        The run so far.
    """

    def __init__(self, message: str, trace: Trace) -> None:
        super().__init__(message)
        self.trace = trace


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
    replaced, and its batch tried once more; after a second failure its requests are dropped. Where all
    workers fail at once, as with a dead MPS daemon, all are started anew.

    Workers for ``policy.first_shares(plan)`` are started before the run, ``policy.copies(plan)`` for each as far as they fit
    beside each other; copies that the GPU does not take are left out and in ``events``. A launch at another of
    ``policy.shares(plan)`` is served by the service's next smaller worker (else by the nearest larger that
    fits), and booked at that one's share, while a standby starts in the background; both are in ``events``.

    Parameters
    ----------
    plan : Plan
        Made from a profile of this device; another's leaves a mark on the trace.
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
    RunError
        If the device fails and cannot be started anew; its ``trace`` holds the run so far.
    """
    device = Cpu() if device is None else device
    require(isinstance(device, Device), "device", device, "a device such as devices.Cpu()")
    require(isinstance(policy, Policy), "policy", policy, "a Policy object such as Temporal()")
    fits = not policy.oversubscribes or getattr(device, "oversubscribe", True)
    require(fits, "device", device, f"one with oversubscribe=True for {policy.name}, whose shares sum to more than 100")
    drain_ms = duration_ms if drain_ms is None else positive("drain_ms", drain_ms)
    recipe = recipe_of(plan, policy)
    ledger = open_ledger(plan, policy, duration_ms, seed)
    # Green contexts prepare every share before the run: that costs no process, and a capture later would stop the GPU.
    first = None if getattr(device, "prepares_all", False) else policy.first_shares(plan)
    copies = count(f"copies of {policy.name}", policy.copies(plan))
    with (
        Helper() if policy.works_apart else contextlib.nullcontext() as helper,
        Fleet(device, plan, policy.shares(plan), seed, options, first, copies, policy.oversubscribes) as fleet,
    ):
        with progress_bar(progress, len(fleet.members), "Starting workers", "worker") as bar:
            fleet.wait_ready(start_timeout_s, bar.update)
        marks = (*device.marks(), *_planned_elsewhere(plan, device))
        session = Session(ledger, policy, fleet, device, hung_ms)
        session.watch, session.helper = watch, helper
        if helper is not None:
            helper.wait_ready(start_timeout_s)
            ledger.state._helper = helper.submit
        error: RuleBroken | FleetLost | None = None
        sampler = device.sampler() if hasattr(device, "sampler") else None
        gc.disable()  # a collection stops the loop for tens of milliseconds
        switch_s = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_S)
        try:
            with (
                sampler or contextlib.nullcontext(),
                progress_bar(progress, round(duration_ms / 1000, 1), policy.name, "s") as bar,
            ):
                session.loop(round(duration_ms * NS_PER_MS), round(drain_ms * NS_PER_MS), bar)
        except (RuleBroken, FleetLost) as broken:
            error = broken
        finally:
            sys.setswitchinterval(switch_s)
            gc.enable()
    if hasattr(device, "cores_for") and not ledger.oversubscribe:
        marks += _starved(session.told.values())
    versions = versions_here("dstack-lab", "torch", "numpy")
    provenance = Provenance("measured", device.describe(), device.mechanism, versions, today(), marks)
    trace = replace(ledger.to_trace(duration_ms, policy.name, seed, provenance), recipe=recipe)
    _annotate(trace, session.told)
    if sampler is not None and sampler.samples:
        samples = pd.DataFrame(sampler.samples)[list(SAMPLES)]
        trace = replace(trace, samples=samples.assign(time_ms=samples["time_ms"] - session.start_ns / NS_PER_MS))
    trace.requests["answer"] = np.concatenate(session.answers)
    trace.requests["score"] = np.concatenate(session.scores)
    if isinstance(error, FleetLost):
        raise RunError(str(error), trace) from error.__cause__
    if error is not None:
        raise PolicyError(str(error), trace) from error.__cause__
    return trace


def _planned_elsewhere(plan: Plan, device: Device) -> tuple[str, ...]:
    """Mark a run whose plan is not of this device: it may be tried, and a reader must see it."""
    source = plan.provenance
    if source.kind == "measured" and source.device == device.describe():
        return ()
    return (f"planned elsewhere: with service times {source.kind} of {source.device}",)


def _starved(told: Iterable[Message]) -> tuple[str, ...]:
    """Mark a run whose workers of one core did not have it; several threads wait for each other anyway."""
    had = [(one["cpu_ms"], one["worker_ms"]) for one in told if one.get("cpu_ms") and one["cores"] == 1]
    part = sum(cpu for cpu, _ in had) / sum(due for _, due in had) if had else 1.0
    return (f"starved: workers of one core had {100 * part:.0f} % of its time; others used it too",) if part < STARVED else ()


def _annotate(trace: Trace, told: dict[int, Message]) -> None:
    """Add columns about each launch, those that any worker had something to say about."""
    number = trace.launches["launch"]
    for column, missing in (("effective_sms", np.nan), ("worker_ms", np.nan), ("gpu_ms", np.nan), ("path", "")):
        values = [told.get(n, {}).get(column) for n in number]
        if any(value not in (None, "") for value in values):
            trace.launches[column] = [missing if value is None else value for value in values]
