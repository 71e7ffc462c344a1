"""A run's loop on the wall clock: hear the workers, book their answers, ask the policy, mend what breaks."""

from __future__ import annotations

import contextlib
import select
import time
from collections.abc import Callable
from heapq import heappop
from typing import Any

import numpy as np

from dstack_lab.devices.base import Device, WorkerDied, WorkerTimeout
from dstack_lab.fleet import Fleet, Member
from dstack_lab.helper import Helper
from dstack_lab.ledger import Ledger
from dstack_lab.policies.base import Policy
from dstack_lab.protocol import Message
from dstack_lab.retries import Retries
from dstack_lab.state import INFINITE, NEVER_NS, NS_PER_MS, Launch
from dstack_lab.turns import Turns

#: A launch is hung after this many times its predicted service time, and at least `HUNG_MS`.
HUNG_TIMES, HUNG_MS = 20, 3000.0
#: Longest sleep of the loop, so that hung workers and a dead daemon are noticed.
NAP_S = 0.25
#: All workers are started anew this often in a row, without an answer between, before the run is given up.
MOST_RESTARTS = 3


class FleetLost(Exception):
    """The device failed and could not be started anew. Becomes a `RunError` with the trace."""


class Session:
    """State of one run's loop: `policy` is reset, the fleet ready; `hung_ms` as of `runner.run`."""

    watch: Callable[[Ledger], bool] | None = None
    helper: Helper | None = None

    def __init__(self, ledger: Ledger, policy: Policy, fleet: Fleet, device: Device, hung_ms: float) -> None:
        self.ledger, self.policy, self.fleet = ledger, policy, fleet
        self.device, self.leases = device, device.leases()
        self.hung_ns = round(hung_ms * NS_PER_MS)
        self.answers = [np.full(times.size, -1, dtype=np.int64) for times in ledger.arrivals_ns]
        self.scores = [np.full(times.size, np.nan) for times in ledger.arrivals_ns]
        self.told: dict[int, Message] = {}  # launch -> what its worker said about it
        self.seen: set[tuple[object, ...]] = set()  # what was news once
        self.retries = Retries(ledger)
        self.restarts, self.looked_ns, self.state = 0, 0, ledger.state
        for (service, share), fewer in fleet.left_out.items():
            n = fleet.places(share)
            self._event("left out", service, f"{n - fewer} of {n} workers at {share:g} %: the GPU takes {fleet.most:g} in all")

    def loop(self, duration_ns: int, drain_ns: int, bar: Any) -> None:
        """Serve until every request is served or dropped, or the drain time is over.

        Raises
        ------
        RuleBroken
            If the policy broke a rule.
        FleetLost
            If the device failed for good.
        """
        self.turns = Turns(self.ledger, self.policy, self._launch)
        heap, state, start = self.turns.heap, self.state, time.monotonic_ns()
        bell, helper = self.fleet.starter.fileno(), self.helper
        bells = [bell] if helper is None else [bell, helper.fileno()]
        self.start_ns, last_s = start, 0.0
        while self.ledger.waiting_total or state._running:
            upcoming = heap[0][0] if heap else NEVER_NS
            nap = min(NAP_S, max(0.0, (upcoming - (time.monotonic_ns() - start)) * 1e-9))
            readable = select.select([*bells, *self.fleet.by_fd], [], [], nap)[0]
            state.now_ns = now = time.monotonic_ns() - start
            if now > duration_ns + drain_ns:
                self._event("stopped", "", f"{self.ledger.waiting_total} requests still waited at the end of the drain time")
                break
            ask = False
            if now - self.looked_ns > NAP_S * 1e9:
                self.looked_ns = now
                if self.watch is not None and not self.watch(self.ledger):
                    self._event("stopped", "", "by hand")
                    break
                ask = self._common("")
            for fd in readable:
                if fd == bell:
                    ask = self._welcome() or ask
                elif (member := self.fleet.by_fd.get(fd)) is not None:  # it may have gone with another one just now
                    ask = self._hear(member) or ask
                elif helper is not None and fd == bells[-1]:
                    for what, detail in helper.news():
                        self._event(what, "", detail)
                    ask = True
            ask = self._find_hung(now) or ask
            while heap and heap[0][0] <= now:
                _, kind, key = heappop(heap)
                ask = self.turns.happen(now, kind, key) or ask
            if ask:
                self.retries.parked = [waiting for waiting in self.retries.parked if not self._place(*waiting)]
                self.turns.take()
            if now * 1e-9 - last_s > 0.1 and now < duration_ns:
                bar.update(round(now * 1e-9 - last_s, 1))
                last_s += round(now * 1e-9 - last_s, 1)

    def _launch(self, number: int, end: int, launch: Launch) -> None:
        """Hand a launch to a worker, or park it until one is free."""
        service, share = launch.service, launch.gpu_pct
        if share not in self.fleet.shares[service] and not self.fleet.at(service, share):
            prepared = sorted(self.fleet.shares[service])
            raise ValueError(f"gpu_pct must be one of the prepared shares {prepared}: name more in the policy's shares()")
        busy = sum(member.launch >= 0 and member.wanted_pct == share for member in self.fleet.at(service, share))
        busy += self.retries.waiting(service, share)
        if busy >= (copies := self.fleet.copies):
            runs = "a batch" if busy == 1 else f"{busy} batches"
            cure = "launch when one has ended, or return more there"
            raise ValueError(f"{service} runs {runs} at {share:g} % already, and the policy's copies() is {copies}: {cure}")
        if not self._place(number, launch):
            self.retries.parked.append((number, launch))

    def _place(self, number: int, launch: Launch) -> bool:
        """Give a booked launch to the best worker that is idle; return whether there is one."""
        service, share = launch.service, launch.gpu_pct
        room = INFINITE if self.ledger.oversubscribe else self.state.free_pct
        member = self.fleet.find(service, share, room)
        if member is None or member.gpu_pct != share:
            self._want(service, share, member)
        if member is None:
            return False
        self.ledger.regrant(number, member.gpu_pct)
        _, _, batch, since, end = self.state._running[number]
        member.launch, member.wanted_pct = number, share
        member.used_ns = now = self.state.now_ns
        member.overdue_ns = now + max(self.hung_ns, HUNG_TIMES * (end - since))
        self.leases.take(member.worker)
        first = self.ledger.first_of(number)
        with contextlib.suppress(WorkerDied, WorkerTimeout):  # its descriptor is readable then, or it is overdue soon
            member.worker.send({"op": "run", "id": number, "inputs": list(range(first, first + batch))})
        return True

    def _want(self, service: str, share: float, instead: Member | None) -> None:
        """Have a standby started for a share without a worker; what serves until then is news once."""
        started, retired = self.fleet.want(service, share)
        if retired is not None:
            self._event("retired", retired.service, f"its worker at {retired.gpu_pct:g} % made room on the GPU")
        if started:
            self._event("standby", service, f"{'another' if self.fleet.at(service, share) else 'a'} worker at {share:g} % starts")
        if instead is not None and (key := ("instead", service, share, instead.gpu_pct)) not in self.seen:
            self.seen.add(key)
            self._event("other share", service, f"{instead.gpu_pct:g} % serves where {share:g} % was asked for: no idle worker")

    def _welcome(self) -> bool:
        """Book what became of workers that were started; return whether the policy has to be asked."""
        ask = False
        for order, _, error, common, _ in self.fleet.arrivals():
            self._event("start failed", order.service, str(error))
            if common:
                self._restart(str(error))
            elif not self._common(str(error)) and not self.fleet.again(order):
                self._lose(order.service)
                ask = self._show(order.service) or ask
        return ask

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
                member.ready, member.starts, member.used_ns = True, 0, self.state.now_ns
                kind = "standby ready" if member.order.standby else "worker ready"
                note = f"pid {member.worker.pid}, {member.gpu_pct:g} %" + getattr(member.worker, "note", "")
                self._event(kind, member.service, note)
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
        member.launch, self.restarts = -1, 0
        self.leases.give(member.worker)
        self.ledger.finish(number, self.state.now_ns)
        self._note(number, member, batch, message)

    def _note(self, number: int, member: Member, batch: int, message: Message) -> None:
        """Keep what the worker told about a launch; a slow path is news the first time."""
        granted, path = message.get("granted_sms", getattr(member.worker, "granted_sms", None)), message.get("path", "")
        times = {"worker_ms": message["service_ms"], "gpu_ms": message.get("gpu_ms"), "cpu_ms": message.get("cpu_ms")}
        self.told[number] = {"effective_sms": granted, "path": path, "cores": getattr(member.worker, "threads", 1), **times}
        key = ("path", member.service, member.gpu_pct, batch)
        if path in ("eager", "padded") and getattr(self.device, "graphs", True) and key not in self.seen:
            self.seen.add(key)
            how = f"batch {batch} at {member.gpu_pct:g} % {'ran eagerly' if path == 'eager' else 'was filled up to a larger one'}"
            places = getattr(self.device, "places", 0) if path == "eager" else 0
            cure = f"; raise {type(self.device).__name__}(places={places})" if places else ""
            self._event("no graph", member.service, f"{how}: no CUDA graph of its own there{cure}")

    def _find_hung(self, now: int) -> bool:
        hung = [m for m in self.fleet.members.values() if m.launch >= 0 and now > m.overdue_ns]
        for member in hung:
            if self.fleet.members.get(member.order.key) is member:  # else all were started anew meanwhile
                since = self.state._running[member.launch][3]
                self._fail(member, "worker hung", f"no answer for {(now - since) / NS_PER_MS:.0f} ms")
        return bool(hung)

    def _fail(self, member: Member, kind: str, detail: str) -> None:
        """Put a failed batch back or, the second time, drop it; start another worker meanwhile."""
        if self._common(detail, member.launch):
            return
        self._event(kind, member.service, detail)
        self.leases.give(member.worker)
        if member.launch >= 0:
            self._take_back(member.launch)
        if not self.fleet.replace(member):
            self._lose(member.service)
        self._show(member.service)

    def _take_back(self, number: int, doubt: bool = True) -> None:
        """Let a launch's requests wait again; with `doubt`, those that failed before are dropped."""
        view = self.state._running[number][0]
        kind, detail = self.retries.take_back(number, doubt)
        self._event(kind, view.name, detail)
        self.turns.expect(view)

    def _show(self, service: str) -> bool:
        """Show the policy a service's queue, or none while nobody can serve it; return whether somebody can."""
        view, served = self.state.by_name[service], self.fleet.serves(service)
        if served:
            self.ledger.show(view)
            self.turns.expect(view)
        else:
            self.ledger.hide(view)
        return served

    def _lose(self, service: str) -> None:
        """Give a place up and, with the last one, the service."""
        if service in self.retries.given_up:
            return
        if not self.fleet.hopeless(service):
            self._event("gave up", service, "one of its workers does not start; others serve in its place")
            return
        self._event("gave up", service, "its workers do not start; its requests are dropped as they come")
        self.retries.give_up(service)

    def _common(self, said: str, suspect: int = -1) -> bool:
        """Start all workers anew if what they share has failed; return whether it has."""
        if not hasattr(self.device, "common_fault") or self.fleet.restarting:
            return False
        why = self.device.common_fault(said)
        if why is not None:
            self._restart(why, suspect)
        return why is not None

    def _restart(self, why: str, suspect: int = -1) -> None:
        """End all workers and start them anew; their batches wait again, that of `suspect` only once.

        Raises
        ------
        FleetLost
            If that was done too often in a row.
        """
        self.restarts += 1
        self._event("all workers lost", "", why)
        for member in self.fleet.members.values():
            self.leases.give(member.worker)
        self.retries.parked.clear()  # they are among those that run
        for number in sorted(self.state._running, reverse=True):
            self._take_back(number, doubt=number == suspect)
        if self.restarts > MOST_RESTARTS:
            raise FleetLost(f"{why} (all workers were started anew {MOST_RESTARTS} times in a row, without an answer between)")
        self.fleet.restart()
        for view in self.state.services:
            self.ledger.hide(view)

    def _event(self, kind: str, service: str, detail: str) -> None:
        self.ledger.events.append((self.state.now_ns / NS_PER_MS, kind, service, detail))
