"""Standbys, replacement beside the loop, and a device that fails as a whole: on a fake device, whose log is checked."""

from __future__ import annotations

import gc
import math
import sys
import time

import numpy as np
import pandas as pd
import pytest
from fake_fleet import FakeDevice, open_files

import dstack_lab as lab
from dstack_lab.policies import Launch, Policy


def plan(*rates):
    """Services a, b, ... of networks of that name; a batch takes 2 ms whatever its share."""
    names = "abc"[: len(rates)]
    rows = [
        {"model": m, "batch": b, "gpu_pct": g, "service_ms": 2.0 + b / 10}
        for m in names
        for b in (1, 2, 4, 8)
        for g in range(10, 101, 10)
    ]
    profile = lab.Profile(pd.DataFrame(rows), lab.Provenance("measured", "fake", "fake"))
    return lab.optimize([lab.Service(n, 200, lab.Deterministic(r)) for n, r in zip(names, rates, strict=True)], profile)


class Asks(Policy):
    """Launches every service at the share that `share(name, now_ms)` says; prepares `first` only."""

    def __init__(self, share, first):
        self.share, self.first = share, first

    def shares(self, plan):
        return {a.service: plan.shares for a in plan.allocations}

    def first_shares(self, plan):
        return self.first

    def decide(self, state):
        found, free = [], state.free_pct
        for view in state.services:
            share = self.share(view.name, state.now_ms)
            if view.ready and not view.in_flight and share <= free + 0.01:
                found.append(Launch(view.name, share, view.queued(view.batch_max)))
                free -= share
        return found


def run(policy, device, *rates, duration_ms=600, **options):
    before, switch_s = open_files(), sys.getswitchinterval()
    try:
        trace = lab.run(plan(*rates), policy, device, duration_ms, seed=1, drain_ms=10_000, **options)
    finally:
        assert not device.live
        assert open_files() == before
        assert (sys.getswitchinterval(), gc.isenabled()) == (switch_s, True)
    return trace


def check(trace):
    """Served once each, by the worker of the service (its answers are the places in the queue), within the GPU."""
    requests, launches = trace.requests, trace.launches
    assert (requests["outcome"] == "served").all()
    for _, mine in requests.groupby("service", observed=True):
        assert mine["answer"].tolist() == list(range(len(mine)))
    starts, ends, share = (launches[c].to_numpy() for c in ("start_ms", "end_ms", "gpu_pct"))
    for at in starts:
        assert share[(starts <= at) & (at < ends)].sum() <= 100.05


def kinds(trace):
    return trace.events["kind"].tolist()


def test_another_share_is_served_at_once_by_the_worker_there_is_and_a_standby_takes_over():
    device = FakeDevice(load_ms=100)
    trace = run(Asks(lambda name, now: 40 if now < 200 else 70, {"a": (20, 40)}), device, 100)
    check(trace)
    assert kinds(trace) == ["standby", "other share", "standby ready"]
    assert trace.events["detail"].tolist()[:2] == [
        "a worker at 70 % starts",
        "40 % serves where 70 % was asked for: no idle worker",
    ]
    ready = trace.events["time_ms"].iloc[-1]
    launches = trace.launches
    assert set(launches.loc[launches["start_ms"] < ready, "gpu_pct"]) == {40}  # also after 200 ms
    assert set(launches.loc[launches["start_ms"] > ready, "gpu_pct"]) == {70}
    assert np.diff(launches["start_ms"]).max() < 100  # nothing waited for the standby
    ran = [line for line in device.log if line.startswith("run")]
    assert ran == [f"run a {share:g}" for share in launches["gpu_pct"]]  # what is booked is what served
    assert device.log[:2] == ["start a 20", "start a 40"]
    assert device.log.count("start a 70") == 1


def test_a_larger_worker_serves_only_with_room_and_a_parked_batch_is_not_lost():
    """b wants 30 % but has a worker of 80 % only, which does not fit beside a's 50 %."""
    device = FakeDevice(load_ms=150, serve_ms=5)
    trace = run(Asks(lambda name, now: {"a": 50, "b": 30}[name], {"a": (50,), "b": (80,)}), device, 150, 60)
    check(trace)
    b = trace.launches[trace.launches["service"] == "b"]
    assert set(b["gpu_pct"]) == {80, 30}
    assert b["gpu_pct"].is_monotonic_decreasing


def test_where_the_gpu_is_full_the_worker_unused_for_longest_makes_room():
    device = FakeDevice(most=4)
    asked = {"a": lambda now: (30, 40, 60)[min(2, int(now // 200))], "b": lambda now: 20}
    trace = run(Asks(lambda name, now: asked[name](now), {"a": (30, 10, 40), "b": (20,)}), device, 100, 100)
    check(trace)
    retired = trace.events[trace.events["kind"] == "retired"]
    assert retired["service"].tolist() == ["a"]
    assert retired["detail"].tolist() == ["its worker at 10 % made room on the GPU"]  # never used; 30 % was, b's is its last
    assert device.log.index("close a 10") < device.log.index("start a 60")
    assert device.peak == 4


def test_one_standby_at_a_time_and_never_at_the_cost_of_a_last_worker():
    device = FakeDevice(most=2)
    trace = run(Asks(lambda name, now: 10 + 10 * (int(now) // 50 % 4), {"a": (50,), "b": (50,)}), device, 100, 100)
    check(trace)
    assert not [kind for kind in kinds(trace) if kind in ("standby", "retired")]
    assert set(trace.launches["gpu_pct"]) == {50}


def test_the_loop_does_not_wait_while_a_stuck_worker_is_ended():
    device = FakeDevice(kill_ms=400)
    killed = []

    def share(name, now):
        if now > 100 and not killed:
            killed.append(next(w for w in device.live if w.model == "a"))
            killed[0].die()
        return 40

    trace = run(Asks(share, {"a": (40,), "b": (40,)}), device, 100, 100, duration_ms=1000)
    check(trace)
    died, ready = (trace.events.loc[trace.events["kind"] == kind, "time_ms"].iloc[0] for kind in ("worker died", "worker ready"))
    assert ready - died >= 400
    b = trace.launches[trace.launches["service"] == "b"]
    assert b["start_ms"].between(died, ready).sum() > 20  # of the 40 requests that came meanwhile
    assert np.diff(b["start_ms"]).max() < 200


def test_another_worker_of_the_service_serves_while_one_is_replaced():
    device = FakeDevice(load_ms=200)
    killed = []

    def share(name, now):
        if now > 100 and not killed:
            killed.append(next(w for w in device.live if w.gpu_pct == 40))
            killed[0].die()
        return 40

    trace = run(Asks(share, {"a": (20, 40)}), device, 100)
    check(trace)
    died, ready = (trace.events.loc[trace.events["kind"] == kind, "time_ms"].iloc[0] for kind in ("worker died", "worker ready"))
    meanwhile = trace.launches[trace.launches["start_ms"].between(died, ready)]
    assert len(meanwhile) > 5
    assert set(meanwhile["gpu_pct"]) == {20}


def test_a_standby_that_never_starts_is_given_up_and_the_service_goes_on():
    device = FakeDevice()
    device.refuse = 99
    trace = run(Asks(lambda name, now: 70, {"a": (40,)}), device, 100)
    check(trace)
    assert kinds(trace) == ["standby", "other share", "start failed", "start failed", "start failed", "gave up"]
    assert set(trace.launches["gpu_pct"]) == {40}
    assert device.refuse == 96


@pytest.mark.slow
def test_on_real_cores_a_share_that_was_not_prepared_comes_as_a_standby():
    shares = lab.devices.Cpu().shares()
    if len(shares) < 2:
        pytest.skip("one core has one share")
    rows = [{"model": "squeezenet1_1", "batch": b, "gpu_pct": g, "service_ms": 20.0 * b} for b in (1, 2) for g in shares]
    profile = lab.Profile(pd.DataFrame(rows), lab.Provenance("measured", "this machine", "core sets"))
    made = lab.optimize([lab.Service("squeezenet1_1", 2000, lab.Poisson(5))], profile)
    policy = Asks(lambda name, now: shares[0] if now < 500 else shares[-1], {"squeezenet1_1": (shares[0],)})
    trace = lab.run(made, policy, lab.devices.Cpu(), 8000, seed=2, drain_ms=60_000)
    assert (trace.requests["outcome"] == "served").all()
    found = trace.events["kind"].tolist()
    assert found.count("standby") == 1
    if "standby ready" in found:  # else the machine was too busy to load a network within 8 s
        ready = trace.events.loc[trace.events["kind"] == "standby ready", "time_ms"].iloc[0]
        assert set(trace.launches.loc[trace.launches["start_ms"] < ready, "gpu_pct"]) == {shares[0]}
        assert set(trace.launches.loc[trace.launches["start_ms"] > ready, "gpu_pct"]) == {shares[-1]}


@pytest.mark.parametrize(
    "policy", [pytest.param(lab.AdaptiveDStack(), marks=pytest.mark.slow), lab.Gslice()], ids=lambda p: p.name
)
def test_policies_that_may_use_any_share_prepare_few(policy):
    made = plan(200, 100)
    policy.reset(made)
    first, all_of_them = policy.first_shares(made), policy.shares(made)
    assert all(set(first[name]) <= set(all_of_them[name]) for name in first)
    assert sum(map(len, first.values())) < sum(map(len, all_of_them.values()))
    device = FakeDevice(most=max(6, sum(map(len, first.values()))))
    check_all = run(policy, device, 200, 100)
    assert (check_all.requests["outcome"] != "unserved").all()
    assert device.peak <= device.most_workers()


# What all workers share


class Breaks(Asks):
    """The device fails as a whole at these times."""

    def __init__(self, device, times, worker_tells=False):
        super().__init__(lambda name, now: 40, {"a": (40,), "b": (40,)})
        self.device, self.times, self.worker_tells = device, list(times), worker_tells

    def decide(self, state):
        if self.times and state.now_ms > self.times[0]:
            self.times.pop(0)
            self.device.fault = "the daemon died"
            for worker in list(self.device.live):
                worker.die()
        return super().decide(state)


def test_all_workers_start_anew_and_no_request_is_lost_or_answered_twice():
    device = FakeDevice(load_ms=20)
    trace = run(Breaks(device, [100, 400]), device, 100, 100, duration_ms=700)
    check(trace)
    found = kinds(trace)
    assert found.count("all workers lost") == 2
    assert found.count("worker ready") == 4
    assert "gave up" not in found  # whose fault it was is known: not that of the batches
    assert device.log.count("recover") == 2


def test_a_dead_daemon_is_noticed_without_a_word_of_any_worker():
    device = FakeDevice(load_ms=5)

    class Quiet(Asks):
        def decide(self, state):
            if state.now_ms > 100 and "recover" not in device.log:
                device.fault = "the daemon died"
            return super().decide(state)

    trace = run(Quiet(lambda name, now: 40, {"a": (40,)}), device, 100, duration_ms=800)
    check(trace)
    assert trace.events["detail"].tolist()[0] == "the daemon died"
    assert device.log.count("recover") == 1


def test_a_batch_that_breaks_the_device_twice_is_dropped_and_the_run_goes_on():
    device = FakeDevice(load_ms=5, poison=7)
    trace = run(Asks(lambda name, now: 40, {"a": (40,), "b": (40,)}), device, 100, 100, duration_ms=500)
    requests = trace.requests
    assert set(requests["outcome"]) == {"served", "dropped"}
    a = requests[requests["service"] == "a"].reset_index(drop=True)
    assert a.loc[7, "outcome"] == "dropped"
    assert (requests.loc[requests["service"] == "b", "outcome"] == "served").all()
    assert device.log.count("recover") == 2
    assert kinds(trace).count("gave up") == 1


def test_a_device_that_stays_broken_ends_the_run_with_the_trace_so_far():
    device = FakeDevice()

    def recover():
        device.log.append("recover")
        raise RuntimeError("the daemon does not start: no libcuda")

    device.recover = recover
    with pytest.raises(lab.RunError, match=r"the daemon does not start: no libcuda .*3 times in a row") as caught:
        run(Breaks(device, [100]), device, 100, 100)
    assert device.log.count("recover") == 3
    trace = caught.value.trace
    counts = trace.requests["outcome"].value_counts()
    assert counts["served"] > 5
    assert counts["unserved"] > 5
    assert kinds(trace).count("all workers lost") == 4


# Arrivals do not wait for the device


def test_requests_come_when_they_would_come_however_slow_the_device_is():
    quick, slow = FakeDevice(serve_ms=1), FakeDevice(serve_ms=150)
    first, second = (run(Asks(lambda name, now: 40, {"a": (40,)}), device, 100) for device in (quick, slow))
    assert first.requests["arrival_ms"].tolist() == second.requests["arrival_ms"].tolist()
    late = second.requests["start_ms"] - second.requests["arrival_ms"]
    assert late.max() > 100  # they waited, and their latency says so
    assert second.launches["batch"].max() > first.launches["batch"].max()
    assert math.isclose(second.requests["arrival_ms"].diff().median(), 10)


def test_an_interrupt_ends_workers_that_are_only_about_to_start():
    device = FakeDevice(load_ms=50, kill_ms=0)

    class Interrupted(Asks):
        def decide(self, state):
            if state.now_ms > 100:
                raise KeyboardInterrupt
            return super().decide(state)

    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run(Interrupted(lambda name, now: 70 if now > 90 else 40, {"a": (40,), "b": (20,)}), device, 100, 100)
    assert time.monotonic() - begin < 60
