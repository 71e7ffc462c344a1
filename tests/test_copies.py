"""Several launches of one service at one share at once: their workers, and what happens when some of those are lost."""

from __future__ import annotations

import math
import os
import signal
import threading
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from builders import plan as toy_plan
from fake_fleet import FakeDevice
from test_standby import check, kinds, run

import dstack_lab as lab
from dstack_lab.devices import Cpu
from dstack_lab.fleet import beside
from dstack_lab.policies import Launch, Policy
from dstack_lab.services import ServiceTable


class Beside(Policy):
    """Launches each service up to `most` times at once at `share`, one batch after another."""

    def __init__(self, share=40, copies=2, most=None, batch=1, first=None):
        self.share, self.n, self.most, self.batch, self.first = share, copies, most or copies, batch, first

    def copies(self, plan):
        return self.n

    def shares(self, plan):
        return {a.service: plan.shares for a in plan.allocations}

    def first_shares(self, plan):
        return self.first or {a.service: (self.share,) for a in plan.allocations}

    def decide(self, state):
        found, free = [], state.free_pct
        for view in state.services:
            waiting, running = view.waiting, view.in_flight
            while waiting and running < self.most and self.share <= free + 0.01:
                found.append(Launch(view.name, self.share, min(waiting, self.batch)))
                waiting, running, free = waiting - found[-1].batch, running + 1, free - self.share
        return found


def most_at_once(launches):
    """Launches that ran at the same time, at most."""
    starts, ends = launches["start_ms"].to_numpy(), launches["end_ms"].to_numpy()
    return max(((starts <= at) & (at < ends)).sum() for at in starts)


def event(trace, kind):
    return trace.events.loc[trace.events["kind"] == kind, "detail"].tolist()


# Simulated


@pytest.mark.parametrize(("servers", "load"), [(2, 0.5), (2, 0.8), (4, 0.7)])
def test_copies_are_the_servers_of_one_queue(servers, load):
    """M/M/c: the wait is Erlang's (C formula), the launches beside each other are never more than c."""
    times = ServiceTable(np.full((1, 100), 1.0))
    asked = load * servers
    made = toy_plan(("q", 1e6, lab.Poisson(1000 * asked), 100.0 / servers, 1, times))
    trace = lab.simulate(made, Beside(100 / servers, servers), 100_000, seed=4, variability=lab.Exponential())
    tail = asked**servers / math.factorial(servers) / (1 - load)
    wait_ms = tail / (sum(asked**k / math.factorial(k) for k in range(servers)) + tail) / (servers - asked)
    waits = (trace.requests["start_ms"] - trace.requests["arrival_ms"]).to_numpy()
    means = [part.mean() for part in np.array_split(waits, 40)]
    assert np.mean(means) == pytest.approx(wait_ms, abs=4 * np.std(means, ddof=1) / math.sqrt(40))
    assert (trace.requests["outcome"] == "served").all()
    finished = np.sort(trace.launches["end_ms"].to_numpy())
    starts = trace.launches["start_ms"].to_numpy()
    assert (starts[servers:] >= finished[: len(starts) - servers]).all()  # the c+1st waits for an end
    assert (np.diff(trace.requests["start_ms"]) >= 0).all()  # first come, first served, whoever ends first
    assert (np.diff(trace.requests["finish_ms"]) < 0).any()


def test_launches_beside_each_other_have_a_row_each_in_a_chrome_trace(tmp_path):
    import json

    made = toy_plan(("q", 1e6, lab.Poisson(1500), 50.0, 1, ServiceTable(np.full((1, 100), 1.0))))
    trace = lab.simulate(made, Beside(50, 2), 200, seed=4, variability=lab.Exponential())
    events = json.loads(trace.to_chrome(tmp_path / "t.json").read_text())["traceEvents"]
    assert {e["tid"] for e in events} == {"q", "q (2)"}
    for row in ("q", "q (2)"):
        mine = [(e["ts"], e["ts"] + e["dur"]) for e in events if e["tid"] == row]
        assert all(end <= start + 1e-6 for (_, end), (start, _) in pairwise(mine))
    assert len(events) == len(trace.launches)


# How many workers


@pytest.mark.parametrize(
    ("gpu_pct", "copies", "oversubscribes", "workers"),
    [(40, 1, False, 1), (40, 3, False, 2), (33.33, 3, False, 3), (33.34, 3, False, 3), (100, 4, False, 1), (100, 4, True, 4)],
)
def test_a_share_has_as_many_workers_as_fit_beside_each_other(gpu_pct, copies, oversubscribes, workers):
    assert beside(gpu_pct, copies, oversubscribes) == workers


def test_each_first_share_has_its_copies_and_they_serve_at_once():
    device = FakeDevice(serve_ms=25)
    trace = run(Beside(first={"a": (40, 50, 100)}), device, 60)
    check(trace)
    assert device.log[:5] == ["start a 40", "start a 50", "start a 100", "start a 40", "start a 50"]
    assert sum(line.startswith("start") for line in device.log) == 5
    assert most_at_once(trace.launches) == 2
    assert kinds(trace) == []


@pytest.mark.parametrize("copies", [0, 1.5, None, True])
def test_copies_are_a_whole_number(copies):
    policy = Beside(most=1)
    policy.n = copies
    with pytest.raises(ValueError, match=r"copies of Beside = .*must be an integer, 1 or more"):
        run(policy, FakeDevice(), 60)


@pytest.mark.parametrize(("copies", "runs"), [(1, "a batch"), (2, "2 batches")])
def test_one_launch_too_many_says_how_many_copies_there_are(copies, runs):
    words = rf"gpu_pct=30.*: a runs {runs} at 30 % already, and the policy's copies\(\) is {copies}: .*return more there"
    with pytest.raises(lab.PolicyError, match=words) as caught:
        run(Beside(30, copies, copies + 1), FakeDevice(serve_ms=100), 100)
    assert len(caught.value.trace.requests) > 0


def test_launches_that_wait_for_a_worker_count_too():
    with pytest.raises(lab.PolicyError, match=r"a runs 2 batches at 30 % already, and the policy's copies\(\) is 2"):
        run(Beside(30, copies=2, most=3), FakeDevice(serve_ms=100, most=1), 100)


def test_where_the_gpu_takes_fewer_workers_further_copies_are_left_out():
    device = FakeDevice(serve_ms=10, most=5)
    trace = run(Beside(20, copies=3), device, 100, 100)
    check(trace)
    assert device.log[:5] == ["start a 20", "start b 20", "start a 20", "start b 20", "start a 20"]
    assert trace.events["time_ms"].tolist() == [0.0]
    assert event(trace, "left out") == ["2 of 3 workers at 20 %: the GPU takes 5 in all"]
    assert trace.events["service"].tolist() == ["b"]
    assert device.peak == 5
    by_service = trace.launches.groupby("service", observed=True)
    assert most_at_once(by_service.get_group("b")) <= 2
    assert not [line for line in device.log if line.startswith("close") and device.log.index(line) < device.log.index("run a 20")]


def test_a_launch_without_a_copy_of_its_own_waits_for_one_and_no_other_worker_makes_room():
    device = FakeDevice(serve_ms=30, most=3)
    trace = run(Beside(40, copies=2, first={"a": (40,), "b": (10, 40)}), device, 50, 10)
    check(trace)
    assert set(kinds(trace)) <= {"left out", "other share"}
    assert most_at_once(trace.launches[trace.launches["service"] == "a"]) == 1
    assert device.peak == 3
    assert sorted(device.log[-3:]) == ["close a 40", "close b 10", "close b 40"]


def test_a_further_copy_is_the_first_to_make_room_for_another_share():
    device = FakeDevice(most=5)
    policy = Beside(20, first={"a": (10, 20), "b": (20,)})
    decide = policy.decide

    def changed(state):
        policy.share, policy.most = (20, 2) if state.now_ms < 200 else (60, 1)
        return decide(state)

    policy.decide = changed
    trace = run(policy, device, 100, 100)
    check(trace)
    assert event(trace, "left out") == ["1 of 2 workers at 20 %: the GPU takes 5 in all"]
    assert event(trace, "retired") == [f"its worker at {share} % made room on the GPU" for share in (10, 20)]
    ended = device.log[: device.log.index("run b 60")]
    assert ended.count("close a 10") == ended.count("close a 20") == 1  # though the other one at 10 % never served
    assert device.peak == 5


def test_copies_of_a_share_that_was_not_prepared_come_one_after_the_other():
    device = FakeDevice(serve_ms=30, load_ms=20)
    trace = run(Beside(40, first={"a": (20,)}), device, 60)
    check(trace)
    assert event(trace, "standby") == ["a worker at 40 % starts", "another worker at 40 % starts"]
    assert device.log[: device.log.index("start a 40")].count("start a 20") == 2
    assert device.log.count("start a 40") == 2
    assert most_at_once(trace.launches[trace.launches["gpu_pct"] == 40]) == 2


# Workers are lost


class Accidents(FakeDevice):
    """Certain requests take for ever or longer, fail or are fatal, the first `times` that they come."""

    def __init__(self, deeds, times=1, **options):
        super().__init__(**{"serve_ms": 5, **options})
        self.deeds, self.times, self.seen, self.holders = deeds, times, [], {}

    def serve(self, worker, inputs):
        (number,) = inputs
        self.seen.append(number)
        self.holders[number] = worker
        if number not in self.deeds or self.seen.count(number) > self.times:
            return self.serve_ms, None
        return self.deeds[number](worker)


def dies(after_ms):
    def deed(worker):
        threading.Timer(after_ms / 1e3, worker.die).start()
        return None, None

    return deed


def once_each(device, trace, *retried):
    """All are served, by two tries for `retried` and one for the others."""
    check(trace)
    assert sorted(device.seen) == sorted([*range(len(trace.requests)), *retried])


def test_a_batch_that_later_ones_have_overtaken_is_tried_again_when_its_worker_dies():
    device = Accidents({10: dies(150)})
    trace = run(Beside(), device, 100)
    once_each(device, trace, 10)
    assert kinds(trace) == ["worker died", "retried", "worker ready"]
    finish = trace.requests["finish_ms"]
    assert (finish[11:15] < finish[10]).all()  # it was overtaken


@pytest.mark.parametrize("load_ms", [1, 400], ids=["a fresh worker is there", "none is there yet"])
def test_two_batches_that_fail_once_each_are_tried_once_more_each_whoever_fails_first(load_ms):
    device = Accidents({10: dies(250), 11: dies(100)}, load_ms=load_ms)
    trace = run(Beside(), device, 100)
    once_each(device, trace, 10, 11)
    assert kinds(trace).count("worker died") == kinds(trace).count("retried") == 2
    assert "gave up" not in kinds(trace)


def test_batches_that_wait_for_a_fresh_worker_hold_no_share_once_their_queue_has_them_again():
    """The worker of the later batch dies first; then nobody is left to serve either, and another service has the GPU."""
    device, seen = Accidents({10: dies(200), 11: dies(100)}, load_ms=500), []

    class Sees(Beside):
        def decide(self, state):
            seen.append((state.now_ms, state["a"].in_flight, state.free_pct))
            return super().decide(state)

    trace = run(Sees(), device, 100, hung_ms=5000)
    once_each(device, trace, 10, 11)
    died = trace.events.loc[trace.events["kind"] == "worker died", "time_ms"].max()
    ready = trace.events.loc[trace.events["kind"] == "worker ready", "time_ms"].min()
    assert next((n, free) for at, n, free in seen if died <= at < ready) == (0, 100.0)


def test_an_overtaken_batch_goes_back_to_its_queue_when_the_batches_that_overtook_it_do():
    """Both workers die while the batch that overtook the first one's runs: the older one cannot go back before the later one."""
    device, seen = Accidents({10: dies(100), 11: dies(200)}, load_ms=500), []

    class Sees(Beside):
        def decide(self, state):
            seen.append((state.now_ms, state["a"].in_flight))
            return super().decide(state)

    trace = run(Sees(), device, 100, hung_ms=5000)
    once_each(device, trace, 10, 11)
    first, last = trace.events.loc[trace.events["kind"] == "worker died", "time_ms"]
    ready = trace.events.loc[trace.events["kind"] == "worker ready", "time_ms"].min()
    assert {n for at, n in seen if first <= at < last} == {2}
    assert {n for at, n in seen if last <= at < ready} == {0}


def test_while_one_copy_is_replaced_the_others_stand_in():
    device = Accidents({10: dies(20)}, load_ms=300)
    trace = run(Beside(), device, 100)
    once_each(device, trace, 10)
    died, ready = (trace.events.loc[trace.events["kind"] == kind, "time_ms"].iloc[0] for kind in ("worker died", "worker ready"))
    assert trace.launches["start_ms"].between(died, ready).sum() > 5
    assert trace.requests["finish_ms"][10] < ready  # the other copy had time for it


def test_a_hung_copy_is_replaced_and_its_batch_tried_again():
    device = Accidents({10: lambda worker: (None, None)})
    trace = run(Beside(), device, 100, hung_ms=400)
    once_each(device, trace, 10)
    assert kinds(trace) == ["worker hung", "retried", "worker ready"]


def test_an_answer_that_comes_after_its_worker_counted_as_hung_is_not_heard():
    device = Accidents({10: lambda worker: (700, None)}, kill_ms=500)
    trace = run(Beside(), device, 100, hung_ms=400)
    once_each(device, trace, 10)
    assert kinds(trace)[:2] == ["worker hung", "retried"]


def test_an_overtaken_batch_that_fails_twice_is_dropped_alone():
    device = Accidents({10: lambda worker: (60, "no memory")}, times=2)
    trace = run(Beside(), device, 100)
    assert trace.requests.loc[trace.requests["outcome"] != "served"].index.tolist() == [10]
    assert trace.requests["outcome"][10] == "dropped"
    assert device.seen.count(10) == 2
    assert event(trace, "gave up") == ["1 requests failed twice and were dropped"]
    served = trace.requests["answer"].drop(10)
    assert served.tolist() == served.index.tolist()


@pytest.mark.parametrize("exact", [False, True], ids=["a process each", "all in one process"])
def test_a_copy_that_never_starts_again_is_given_up_and_the_others_go_on(exact):
    device = Accidents({10: dies(20)})
    device.refuse, device.prepares_all = 99, exact
    policy = Beside()
    policy.shares = policy.first_shares
    trace = run(policy, device, 100)
    once_each(device, trace, 10)
    assert kinds(trace) == ["worker died", "retried", *["start failed"] * 3, "gave up"]
    assert event(trace, "gave up") == ["one of its workers does not start; others serve in its place"]


def test_all_copies_lost_for_good_end_the_service_and_no_other():
    device = FakeDevice(serve_ms=5)

    class Strikes(Beside):
        def decide(self, state):
            if state.now_ms > 100 and not device.refuse:
                device.refuse = 99
                for worker in [w for w in device.live if w.model == "a"]:
                    worker.die()
            return super().decide(state)

    trace = run(Strikes(20), device, 100, 100)
    assert set(trace.requests["outcome"]) == {"served", "dropped"}
    by_service = dict(list(trace.requests.groupby("service", observed=True)["outcome"]))
    assert (by_service["b"] == "served").all()
    a = (by_service["a"] == "served").tolist()
    assert a == sorted(a, reverse=True)
    assert event(trace, "gave up")[-1] == "its workers do not start; its requests are dropped as they come"


@pytest.mark.parametrize("request_ms", [None, 120], ids=["both run", "the later one has ended"])
def test_when_all_workers_are_lost_both_batches_are_tried_again_and_copies_come_back(request_ms):
    device = Accidents({}, load_ms=10)

    def strike(worker):
        def fault():
            device.fault = "the daemon died"
            for one in list(device.live):
                one.die()

        threading.Timer(0.1, fault).start()
        return None, None

    device.deeds = {10: strike, 11: lambda worker: (request_ms and 5, None)}
    trace = run(Beside(), device, 100)
    check(trace)
    tries = {number: device.seen.count(number) for number in set(device.seen)}
    assert tries[10] == 2
    assert tries[11] == (1 if request_ms else 2)
    assert max(tries.values()) == 2
    assert kinds(trace).count("all workers lost") == 1
    assert kinds(trace).count("worker ready") == 2
    assert "gave up" not in kinds(trace)


# On real cores


def on_cores(rate_rps):
    shares = Cpu().shares()
    if len(shares) < 2:
        pytest.skip("one core has one share")
    rows = [{"model": "squeezenet1_1", "batch": b, "gpu_pct": g, "service_ms": 20.0 * b} for b in (1, 2) for g in shares]
    profile = lab.Profile(pd.DataFrame(rows), lab.Provenance("measured", "this machine", "core sets"))
    return lab.optimize([lab.Service("squeezenet1_1", 2000, lab.Poisson(rate_rps))], profile), shares[0]


def children():
    from test_runner import children

    return children()


@pytest.mark.slow
def test_two_copies_on_real_cores_serve_at_once_on_cores_of_their_own():
    made, share = on_cores(45)
    held, shared = [], []

    class Watching(Beside):
        def decide(self, state):
            if state.now_ms > 200 and not held:
                held.extend(os.sched_getaffinity(pid) for pid in children())
            if len(state.running) == 2:
                shared.append(set.intersection(*(os.sched_getaffinity(pid) for pid in children())))
            return super().decide(state)

    trace = lab.run(made, Watching(share, batch=2), Cpu(), 1500, seed=2, drain_ms=60_000)
    assert (trace.requests["outcome"] == "served").all()
    assert len(held) == 2
    assert shared
    assert not any(shared)  # while both run
    assert most_at_once(trace.launches) == 2
    assert kinds(trace) == []
    alone = lab.run(made, Beside(share, copies=1, batch=2), Cpu(), 300, seed=2, drain_ms=60_000)
    same = trace.requests["answer"].to_numpy()[: len(alone.requests)]
    assert (alone.requests["answer"] == same).all()  # an answer does not depend on which copy gave it
    assert not children()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("deed", "kind"), [(signal.SIGKILL, "worker died"), (signal.SIGSTOP, "worker hung")], ids=["killed", "hung"]
)
def test_a_copy_on_real_cores_is_lost_while_both_run(deed, kind):
    made, share = on_cores(45)
    struck = []

    class Striking(Beside):
        def decide(self, state):
            if state.now_ms > 200 and len(state.running) == 2 and not struck:
                struck.append(min(children()))
                os.kill(struck[0], deed)
            return super().decide(state)

    trace = lab.run(made, Striking(share), Cpu(), 1500, seed=2, drain_ms=60_000, hung_ms=500)
    assert (trace.requests["outcome"] == "served").all()
    assert (trace.requests["answer"] >= 0).all()
    found = kinds(trace)
    assert found.count(kind) == 1
    assert set(found) <= {kind, "retried", "worker ready"}
    assert found.count("retried") == 1
    assert trace.launches["batch"].sum() == len(trace.requests)
    assert not children()
