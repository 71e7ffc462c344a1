"""A policy's turns: ask it what to do, check and book its decisions, and remember when to ask again.

Shared by the simulator's virtual clock and the runner's wall clock, so that both give a policy the
same turns. Order of events at one instant, which makes every simulated run repeatable: (1) batches
end, in the order they were launched; (2) batches become ready, by service; (3) wake-ups;
(4) arrivals, for policies that ask for them. Then the policy decides once. A wake-up that it asks for
at that same instant, or within `SOON_NS`, gives it one more turn, `TURNS` times in a row at most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from heapq import heappush
from itertools import islice

from dstack_lab.ledger import Ledger
from dstack_lab.policies.base import Decision, Policy
from dstack_lab.state import INFINITE, NEVER_NS, NS_PER_MS, Drop, Launch, ServiceView, Wake

END, READY, WAKE, ARRIVAL = range(4)
NO_LIMIT = -INFINITE
#: Turns in a row that each ask for the next one within this time, before a policy is stopped as endless: on a
#: wall clock no two turns come at the same instant.
TURNS, SOON_NS = 1000, 1000
#: Decisions that an iterator may give in one turn before it is stopped as endless.
DECISIONS = 100_000


class RuleBroken(Exception):
    """A policy broke a rule or raised: the message says which, when and how. Becomes a `PolicyError` with the trace."""


class Turns:
    """Events ahead and the turns they cause.

    Parameters
    ----------
    ledger : Ledger
    policy : Policy
        Already reset.
    on_launch : callable of (launch number, predicted end [ns], Launch)
        Called for each launch that was booked.
    """

    def __init__(self, ledger: Ledger, policy: Policy, on_launch: Callable[[int, int, Launch], None]) -> None:
        self.ledger = ledger
        self.state = ledger.state
        self.policy = policy
        self.on_launch = on_launch
        self.heap: list[tuple[int, int, int]] = []  # (time [ns], kind, launch or service)
        self.launched_ns = 0  # time of the last launch
        self.needs_pct = NO_LIMIT if policy.oversubscribes else policy.needs_pct  # nothing is ever free then
        self._turns = 0
        self._decide, self._launch, self._refresh = policy.decide, ledger.launch, ledger.refresh
        for view in self.state.services:
            self.expect(view)
            if policy.every_arrival:
                heappush(self.heap, (view._arrivals[0], ARRIVAL, view.index))
        heappush(self.heap, (0, WAKE, 0))  # the policy's first turn

    def expect(self, view: ServiceView) -> None:
        """Queue the event of `view`'s next batch becoming ready."""
        if (at := self.ledger.refresh(view)) >= 0:
            heappush(self.heap, (at, READY, view.index))

    def happen(self, now: int, kind: int, key: int) -> bool:
        """Let an event other than END happen; return whether the policy has to be asked."""
        if kind == READY:
            view = self.state.services[key]
            if view.ready or view._ready_ns > now:  # its queue has moved on since
                return False
            view.become_ready()
            return self.state.free_pct >= self.needs_pct
        if kind == ARRIVAL:
            view = self.state.services[key]
            following = view._arrivals[view._head + view.waiting]
            if following != NEVER_NS:
                heappush(self.heap, (following, ARRIVAL, key))
        return True

    def take(self) -> None:
        """Ask the policy, and book what it decides.

        Raises
        ------
        RuleBroken
        """
        state = self.state
        try:
            decisions = self._decide(state)
            if type(decisions) is not list:
                decisions = self._listed(decisions)
        except RuleBroken:
            raise
        except Exception as error:
            raise RuleBroken(f"{self.policy.name} raised at {state.now_ms:.6f} ms: {error!r}") from error
        if not decisions:
            self._turns = 0
            return
        now, soon = state.now_ns, False
        for decision in decisions:
            try:
                if type(decision) is Launch:
                    view, number, end = self._launch(decision)
                    self.launched_ns = now
                    self.on_launch(number, end, decision)
                elif type(decision) is Wake:
                    at = round(decision.at_ms * NS_PER_MS)
                    if at < now:
                        raise ValueError(f"at_ms must not be before now, {state.now_ms}")
                    heappush(self.heap, (at, WAKE, 0))
                    if at - now <= SOON_NS:
                        soon = True
                    continue
                elif type(decision) is Drop:
                    view = self.ledger.drop(decision)
                else:
                    raise ValueError("a decision must be a Launch, Drop or Wake")
            except (ValueError, TypeError, OverflowError) as error:
                raise self._broken(decision, error) from error
            if (at := self._refresh(view)) >= 0:
                heappush(self.heap, (at, READY, view.index))
        if not soon:
            self._turns = 0
        elif self._turns < TURNS:
            self._turns += 1
        else:
            raise self._broken(decisions[0], f"more than {TURNS} turns at one instant, each of which asked for the next")

    def _listed(self, decisions: object) -> list[Decision]:
        """Return what a policy answered as a list; nothing, for None."""
        if decisions is None:
            return []
        single = isinstance(decisions, (Launch, Drop, Wake, str, bytes))
        if single or not isinstance(decisions, Iterable):
            raise self._broken(repr(decisions), "decide must return a list of Launch, Drop and Wake")
        listed = list(islice(decisions, DECISIONS + 1))
        if len(listed) > DECISIONS:
            raise self._broken(listed[0], f"more than {DECISIONS} decisions in one turn")
        return listed

    def _broken(self, decision: object, why: object) -> RuleBroken:
        return RuleBroken(f"{self.policy.name} at {self.state.now_ms:.6f} ms: {decision}: {why}")
