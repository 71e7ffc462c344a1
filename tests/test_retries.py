"""Launches of one service that begin, end and fail in any order: the books of their requests."""

from __future__ import annotations

import numpy as np
import pytest
from builders import plan as toy_plan
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

import dstack_lab as lab
from dstack_lab.ledger import Ledger
from dstack_lab.policies import Drop, Launch
from dstack_lab.retries import Retries
from dstack_lab.services import ServiceTable


class Books(RuleBasedStateMachine):
    """Launches of one service in any number and order begin, end and fail: no request is lost, none ends twice."""

    REQUESTS = 12

    def __init__(self):
        super().__init__()
        times = ServiceTable(np.full((4, 100), 10.0))
        made = toy_plan(("a", 50, lab.Replay([0.0] * self.REQUESTS), 10.0, 4, times))
        self.ledger = Ledger(made, [np.zeros(self.REQUESTS)], [0.0])
        self.retries, self.state = Retries(self.ledger), self.ledger.state
        self.ledger.refresh(self.state["a"])
        self.failed = set()
        self.served, self.doubts = [0] * self.REQUESTS, [0] * self.REQUESTS

    def rows(self, number):
        first = self.ledger.first_of(number)
        return range(first, first + self.state._running[number][2])

    def parked(self):
        return [number for number, _ in self.retries.parked]

    def busy(self):
        return [number for number in self.state._running if number not in self.parked()]

    @rule(batch=st.integers(1, 4), parked=st.booleans())
    def launch(self, batch, parked):
        view = self.state["a"]
        batch = min(batch, view.waiting)
        if batch and self.state.free_pct >= 10:
            decision = Launch("a", 10.0, batch)
            _, number, _ = self.ledger.launch(decision)
            if parked:
                self.retries.parked.append((number, decision))
            self.ledger.refresh(view)

    @rule()
    def drop(self):
        view = self.state["a"]
        if view.waiting:
            self.ledger.drop(Drop("a", 1))
            self.ledger.refresh(view)

    @precondition(lambda self: self.busy())
    @rule(data=st.data())
    def end(self, data):
        number = data.draw(st.sampled_from(self.busy()))
        for row in self.rows(number):
            self.served[row] += 1
        self.ledger.finish(number, self.state.now_ns)

    @precondition(lambda self: self.retries.parked)
    @rule(data=st.data(), share=st.sampled_from([5.0, 10.0]))
    def place(self, data, share):
        number = data.draw(st.sampled_from(self.parked()))
        self.retries.parked = [waiting for waiting in self.retries.parked if waiting[0] != number]
        self.state.now_ns += 1
        self.ledger.regrant(number, share)

    @precondition(lambda self: self.busy())
    @rule(data=st.data(), doubt=st.booleans())
    def fail(self, data, doubt):
        number = data.draw(st.sampled_from(self.busy()))
        rows, before = self.rows(number), list(self.doubts)
        for row in rows:
            self.doubts[row] += doubt
        dropped = len(self.ledger._dropped)
        kind, _ = self.retries.take_back(number, doubt)
        self.failed.add(number)
        assert self.retries.waiting("a", 10.0) == len({*self.parked()} - self.failed)  # what the policy asked for
        lost = [row for _, first, n in self.ledger._dropped[dropped:] for row in range(first, first + n)]
        assert set(lost) <= {row for row in rows if before[row]}  # only what failed before
        assert (kind == "gave up") == bool(lost)
        assert not doubt or not before[rows[0]] or rows[0] in lost  # the oldest has had its second chance
        self.ledger.refresh(self.state["a"])

    def teardown(self):
        held = sum(share for _, share, *_ in self.state._running.values())
        assert self.state.free_pct == pytest.approx(100 - held)
        assert self.state["a"].in_flight == len(self.state._running)
        head = self.state["a"]._head
        waiting = set(range(head, self.REQUESTS))
        running = [row for number in self.state._running for row in self.rows(number)]
        gone = [row for _, first, n in self.ledger._dropped for row in range(first, first + n)]
        done = [row for row, times in enumerate(self.served) for _ in range(times)]
        assert sorted([*waiting, *running, *gone, *done]) == list(range(self.REQUESTS))
        assert self.ledger.waiting_total == len(waiting)
        outcome = self.ledger.to_trace(1.0, "books", 0, lab.Provenance("simulated", "toy", "model")).requests["outcome"]
        told = {"dropped": set(gone), "served": set(done), "unserved": waiting | set(running)}
        for name, rows in told.items():
            assert set(np.flatnonzero(outcome == name)) == rows


def test_no_request_is_lost_or_ends_twice_whatever_fails_in_whatever_order():
    run_state_machine_as_test(Books, settings=settings(max_examples=150, stateful_step_count=30, deadline=None))
