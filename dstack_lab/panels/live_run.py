"""Real workers on this machine, watched while they run: start, stop, throughput, latency and shares."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable
from typing import Any

import ipywidgets
import numpy as np

from dstack_lab import figures
from dstack_lab.arrivals import Poisson
from dstack_lab.bounds import checked_services
from dstack_lab.devices import Cpu
from dstack_lab.devices.base import Device
from dstack_lab.figures.progress import Progress
from dstack_lab.ledger import Ledger
from dstack_lab.metrics import summary
from dstack_lab.panels.base import Look, Panel, as_profile
from dstack_lab.panels.racing import Policies, idle, named
from dstack_lab.panels.stoppable import Stoppable
from dstack_lab.policies import DStack, Temporal
from dstack_lab.profiler import measure
from dstack_lab.profiles import Profile
from dstack_lab.runner import run
from dstack_lab.services import Plan, Service
from dstack_lab.traces import Trace
from dstack_lab.trials import plan_for
from dstack_lab.workloads import load_of, scaled

#: What runs where nothing is asked for: small networks, at a part of what this machine can serve.
MODELS, BATCHES, SLO_TIMES, LOAD = ("squeezenet1_1", "shufflenet_v2_x1_0"), (1, 2), 10, 0.4
SLICES = 20
#: States in which the thread of a run waits for workers, which it would do for seconds.
WAITING = ("measuring this machine", "loading networks")
#: How long `stop` waits for a run [s]: a policy of one's own may never return from `decide`.
STOP_S = 30.0
#: Panels of this kernel.
_ALL: weakref.WeakSet[LiveRun] = weakref.WeakSet()


class LiveRun(Panel):
    """Run a policy on real workers and watch.

    Nothing starts before `start`, or its button. The run goes on in the background; `wait` waits for its end.

    Parameters
    ----------
    services : iterable of Service, optional
        By default two small networks at 0.4 of what this machine can serve, measured first.
    profile : Profile, str or path, optional
        Measured on `device`; measured at the first start by default.
    policy : Policy, several, or mapping, optional
        D-STACK and temporal sharing by default.
    device : Device, optional
        The cores of this machine by default.
    seconds : float
        Length of a run [s].

    Attributes
    ----------
    policy, seconds
        Controls of the next run.
    trace : Trace or None
        Of the last run that ended.
    """

    def __init__(
        self,
        services: Iterable[Service] | None = None,
        profile: Profile | str | None = None,
        policy: Policies | None = None,
        device: Device | None = None,
        seconds: float = 10,
    ) -> None:
        super().__init__()
        self.device = Cpu() if device is None else device
        self.profile = None if profile is None else as_profile(profile)
        self.services = None if services is None else tuple(services)
        if self.services is not None and self.profile is not None:
            self.services = checked_services(self.services, self.profile)
        self.policies = named([DStack(reject=True), Temporal()] if policy is None else policy)
        self.trace: Trace | None = None
        self._state, self._rows_seen = "not started", np.empty((0, 7))
        self._plan: Plan | None = None
        self._ledger: Ledger | None = None
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._workers: Stoppable | None = None
        self.policy = self._choice("policy", "Policy", list(self.policies), "Who decides what runs when")
        self.seconds = self._slider("seconds", "Length [s]", 1.0, 120.0, float(seconds), "Of the next run", live=False)
        self.start_button = ipywidgets.Button(description="Start", tooltip="Start workers and serve real requests")
        self.stop_button = ipywidgets.Button(description="Stop", tooltip="End the run and its workers", disabled=True)
        self.start_button.on_click(lambda _: self.start())
        self.stop_button.on_click(lambda _: self.stop())
        self._rows.append(ipywidgets.HBox([self.start_button, self.stop_button]))
        self._length_s, self._said_policy = float(seconds), self.policy.value
        _ALL.add(self)
        self._begin()

    @property
    def running(self) -> bool:
        """Whether a run is going on."""
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Start a run in the background; what forbids it is said in words."""
        if self.running:
            self._say("a run is going on already: stop it first")
            return
        try:
            where, slots = self.device.describe(), len(self.device.shares())
        except Exception as error:  # no driver, no daemon: whatever a device needs and has not
            self._say(f"{type(error).__name__}: {error}")
            return
        if slots < 2:
            self._say(f"{where} has one share only: nothing can run side by side without a second core")
            return
        others = [other for other in _ALL if other.running and other.device.describe() == where]
        for other in others:  # its panel may be out of reach: a cell that is run anew makes another
            other.stop()
            if other.running:
                self._say(f"another live run does not end, and two would take {where} from each other: {other.message}")
                return
        self._say(f"ended another live run: two would take {where} from each other" if others else "")
        self.trace, self._ledger, self._rows_seen = None, None, np.empty((0, 7))
        self._length_s, self._said_policy = self.seconds.value, self.policy.value
        self._stopping.clear()
        self._workers = Stoppable(self.device)
        self._enter("starting")
        self._thread = threading.Thread(target=self._go, name="dstack_lab LiveRun", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the run and its workers, and wait until they are gone; what keeps them is said in words."""
        self._stopping.set()
        if self._thread is not None:
            if self._workers is not None and self._state in ("starting", *WAITING):
                self._workers.stop()
            self._thread.join(STOP_S)
            stuck = f"{self._said_policy} does not return from decide(): the run ends when it does, or when the kernel restarts"
            self._say(stuck if self.running else "")

    def wait(self) -> None:
        """Wait for the end of the run; an interrupt stops it."""
        try:
            while self.running:
                self._thread.join(0.2)  # type: ignore[union-attr]
        except KeyboardInterrupt:
            self.stop()
            raise

    def _go(self) -> None:
        try:
            assert self._workers is not None
            plan = self._planned(self._workers)
            if self._stopping.is_set():
                self._enter("stopped before it began")
                return
            policy = self.policies[self._said_policy]
            length_ms = 1000 * self._length_s
            self._enter("loading networks")
            self.trace = run(plan, policy, self._workers, length_ms, seed=1, drain_ms=2000.0, watch=self._watch)
            self._enter("stopped" if self._stopping.is_set() else "ended")
        except Exception as error:
            if self._stopping.is_set():  # its workers were killed
                self._enter("stopped before it began")
                return
            self._enter(f"failed: {type(error).__name__}: {error}")

    def _planned(self, device: Device) -> Plan:
        """Measure this machine, if nobody has, and plan."""
        if self.profile is None:
            self._enter("measuring this machine")
            names = MODELS if self.services is None else tuple(dict.fromkeys(s.model for s in self.services))
            shares = self.device.shares()
            some = (shares[0], shares[len(shares) // 2], shares[-1])
            self.profile = measure(list(names), device, BATCHES, some, progress=False)
        if self.services is None:
            slow = self.profile.table.groupby("model")["service_ms"].max()
            own = [Service(m, float(np.ceil(SLO_TIMES * slow[m])), Poisson(1.0)) for m in self.profile.models[:2]]
            self.services = scaled(own, LOAD / load_of(own, self.profile))
        plan = plan_for(checked_services(self.services, self.profile), self.profile, "efficacy", None)
        self._plan = plan
        return plan

    def _watch(self, ledger: Ledger) -> bool:
        """Look at a run's books, in its own thread; whether to go on."""
        self._ledger, self._rows_seen = ledger, ledger.finished()
        self._enter("running")
        return not self._stopping.is_set()

    def _enter(self, state: str) -> None:
        self._state = state
        busy = state in ("starting", *WAITING, "running")
        self.start_button.disabled, self.stop_button.disabled = busy, not busy
        self._redraw()

    def _look(self) -> Look:
        plan = self._plan
        names = () if plan is None else tuple(s.name for s in plan.services)
        facts: dict[str, Any] = {"state": self._state, "policy": self._said_policy, "services": list(names)}
        origin = f"measured, {self.device.describe()}, {self.device.mechanism}"
        words = f"{self._said_policy} on {self.device.describe()}: {self._state}."
        if self.trace is not None:
            origin = str(self.trace.provenance)
            last = summary(self.trace).iloc[-1]
            facts |= {
                "requests": len(self.trace.requests),
                "launches": len(self.trace.launches),
                "goodput_rps": round(float(last["goodput_rps"]), 1),
                "attainment": round(float(last["slo_attainment"]), 3),
                "p99_ms": None if np.isnan(last["p99_ms"]) else round(float(last["p99_ms"]), 1),
            }
            words += f" {last['goodput_rps']:.3g} requests/s in time, {last['slo_attainment']:.1%} of all requests"
            words += "." if np.isnan(last["p99_ms"]) else f", p99 {last['p99_ms']:.4g} ms."
        seen = self._so_far(f"{self._said_policy}, real workers: {self._state.partition(':')[0]}", origin, names)
        silent = "" if self.trace is None else idle(self.trace, self._said_policy)
        trouble = self._state if self._state.startswith("failed") else silent
        return Look(facts, words, figures.progress(seen), trouble)

    def _so_far(self, title: str, origin: str, names: tuple[str, ...]) -> Progress:
        """Cut what ended so far into slices of time."""
        step = max(self._length_s, 1.0) / SLICES
        log, ledger = self._rows_seen, self._ledger
        until = 0 if not len(log) else int(log[:, 4].max() * 1e-9 / step)
        services = self._plan.services if self._plan else ()
        values: dict[str, Any] = {key: np.full((len(names), until), np.nan) for key in figures.PANES}
        if ledger is not None and until:
            for i, service in enumerate(services):
                mine = log[log[:, 0] == i]
                ends = np.repeat(mine[:, 4], mine[:, 2].astype(int))
                which = np.concatenate([np.arange(a, a + b) for a, b in mine[:, 1:3].astype(int)] or [np.empty(0, dtype=int)])
                latency = (ends - ledger.arrivals_ns[i][which]) * 1e-6
                slot = (ends * 1e-9 / step).astype(int)
                good = np.bincount(slot[latency <= service.slo_ms], minlength=until)[:until]
                values["in_time_rps"][i] = good / step
                area = mine[:, 5] * (mine[:, 4] - mine[:, 3]) * 1e-9
                held = np.bincount((mine[:, 4] * 1e-9 / step).astype(int), area, minlength=until)
                values["held_pct"][i] = held[:until] / step
                for k in range(until):
                    values["latency_ms"][i, k] = np.median(latency[slot == k]) if (slot == k).any() else np.nan
        return Progress(
            title, origin, names, np.asarray(step * np.arange(1, until + 1), dtype=np.float64), values, self._length_s
        )
