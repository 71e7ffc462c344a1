"""Real workers on this machine's cores: bookkeeping is exact, whatever goes wrong. Nothing here asserts a speed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

import dstack_lab as lab
from dstack_lab.devices import Cpu
from dstack_lab.devices.base import WorkerError
from dstack_lab.devices.leases import CoreLeases
from dstack_lab.devices.process import WorkerProcess
from dstack_lab.policies import Launch, Policy, Wake
from dstack_lab.runner import _starved

pytestmark = pytest.mark.slow

MEASURED = lab.Provenance("measured", "this machine", "core sets")


def profile(*models: str) -> lab.Profile:
    """Rough service times, enough to plan with: these tests check books, not predictions."""
    shares = Cpu().shares()
    rows = [
        {"model": m, "batch": b, "gpu_pct": g, "service_ms": 20.0 * b * shares[-1] / g}
        for m in models
        for b in (1, 2, 4)
        for g in shares
    ]
    return lab.Profile(pd.DataFrame(rows), MEASURED)


def plan(*rates: float, slo_ms: float = 2000.0) -> lab.Plan:
    names = ("squeezenet1_1", "shufflenet_v2_x1_0")[: len(rates)]
    services = [lab.Service(n, slo_ms, lab.Poisson(r)) for n, r in zip(names, rates, strict=True)]
    return lab.optimize(services, profile(*names), "capacity")


def children() -> set[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(os.getpid())], capture_output=True, text=True, check=False).stdout
    return {int(p) for p in found.split() if _is_worker(int(p))}


def _is_worker(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return b"dstack_lab.worker" in file.read()
    except OSError:
        return False


def check_books(trace: lab.Trace) -> None:
    """Every request is served or dropped once; what is served has an answer, and shares fit."""
    requests, launches = trace.requests, trace.launches
    served = (requests["outcome"] == "served").to_numpy()
    assert (requests["outcome"] != "unserved").all()
    assert ((requests["answer"] >= 0).to_numpy() == served).all()
    assert (requests["score"].notna().to_numpy() == served).all()
    per_launch = requests[served].groupby("launch").size()
    assert per_launch.to_dict() == launches.set_index("launch")["batch"].to_dict()
    assert (requests.loc[served, "finish_ms"] > requests.loc[served, "arrival_ms"]).all()
    starts, ends, share = (launches[c].to_numpy() for c in ("start_ms", "end_ms", "gpu_pct"))
    for at in starts:
        assert share[(starts <= at) & (at < ends)].sum() <= 100 + 0.05


@pytest.mark.parametrize("policy", [lab.Temporal(), lab.DStack()], ids=["Temporal", "DStack"])
def test_a_real_run_has_the_simulators_schema_and_requests(policy):
    made = plan(6, 8)
    real = lab.run(made, policy, Cpu(), 2000, seed=3, drain_ms=30_000)
    check_books(real)
    simulated = lab.simulate(made, policy, 2000, seed=3)
    assert real.requests.columns.tolist() == [*simulated.requests.columns, "answer", "score"]
    assert real.launches.columns.tolist() == [*simulated.launches.columns, "worker_ms"]  # a CPU has neither SMs nor graphs
    spent = real.launches["end_ms"] - real.launches["start_ms"]
    assert (real.launches["worker_ms"] > 0).all()
    assert (real.launches["worker_ms"] <= spent).all()  # both clocks are one; what is left over is dispatch
    assert np.allclose(real.requests["arrival_ms"], simulated.requests["arrival_ms"])
    assert real.provenance.kind == "measured"
    assert "core" in real.provenance.device
    assert "planned elsewhere: with service times measured of this machine" in real.provenance.marks
    assert real.events.empty
    assert not children()


def test_a_plan_of_this_machine_leaves_no_mark():
    made = plan(6)
    here = replace(made, provenance=lab.Provenance("measured", Cpu().describe(), "core sets"))
    assert not any("planned elsewhere" in mark for mark in lab.run(here, lab.Temporal(), Cpu(), 300).provenance.marks)
    guessed = replace(here, provenance=replace(here.provenance, kind="simulated"))
    marks = lab.run(guessed, lab.Temporal(), Cpu(), 300).provenance.marks
    assert f"planned elsewhere: with service times simulated of {Cpu().describe()}" in marks


def test_the_same_request_gets_the_same_answer_whatever_its_batch():
    made = plan(12)
    first = lab.run(made, lab.Temporal(), Cpu(), 1500, seed=1, drain_ms=30_000).requests
    second = lab.run(made, lab.DStack(patience=0.9), Cpu(), 1500, seed=1, drain_ms=30_000).requests
    assert (first["answer"] == second["answer"]).all()
    assert np.allclose(first["score"], second["score"], atol=1e-4)


class Once(Policy):
    """Serves each service at the whole machine and calls `then` after a number of launches."""

    def __init__(self, then, after: int = 2) -> None:
        self.then, self.after = then, after

    def reset(self, plan):
        self.launched = 0

    def shares(self, plan):
        return {a.service: (100.0,) for a in plan.allocations}

    def decide(self, state):
        ready = [s for s in state.services if s.ready]
        if not ready or state.free_pct < 100:
            return []
        self.launched += 1
        if self.launched == self.after:
            threading.Timer(0.005, self.then).start()
        service = min(ready, key=lambda s: s.due_ms)
        return [Launch(service.name, 100, service.queued(service.batch_max))]


def victim(model: str) -> int:
    for pid in children():
        with open(f"/proc/{pid}/cmdline") as file:
            if f"--model={model}" in file.read():
                return pid
    raise AssertionError(f"no worker of {model}")


@pytest.mark.parametrize(
    ("deed", "kind"), [(signal.SIGKILL, "worker died"), (signal.SIGSTOP, "worker hung")], ids=["killed", "hung"]
)
def test_a_lost_worker_is_replaced_and_its_batch_tried_again(deed, kind):
    policy = Once(lambda: os.kill(victim("squeezenet1_1"), deed))
    trace = lab.run(plan(6, 6), policy, Cpu(), 4000, seed=2, drain_ms=60_000, hung_ms=500)
    check_books(trace)
    assert (trace.requests["outcome"] == "served").all()
    kinds = trace.events["kind"].tolist()
    assert kinds.count(kind) == 1
    assert "worker ready" in kinds
    assert trace.events.loc[trace.events["kind"] == kind, "service"].tolist() == ["squeezenet1_1"]
    down = trace.events["time_ms"].iloc[0], trace.events.loc[trace.events["kind"] == "worker ready", "time_ms"].iloc[0]
    others = trace.launches[(trace.launches["service"] == "shufflenet_v2_x1_0") & trace.launches["start_ms"].between(*down)]
    assert len(others) > 0  # the other service went on meanwhile
    assert not children()


def test_a_batch_that_fails_twice_is_dropped_and_the_service_goes_on():
    class Killer(Once):
        """Kills the worker at its first two launches."""

        def decide(self, state):
            decisions = super().decide(state)
            if decisions and self.launched <= 2:
                os.kill(victim("squeezenet1_1"), signal.SIGKILL)
            return decisions

    trace = lab.run(plan(6), Killer(lambda: None), Cpu(), 1500, seed=2, drain_ms=60_000)
    check_books(trace)
    kinds = trace.events["kind"].tolist()
    assert kinds.count("worker died") == 2
    assert kinds.count("retried") == 1
    assert kinds.count("gave up") == 1
    outcomes = trace.requests["outcome"].value_counts()
    assert outcomes["dropped"] >= 1
    assert outcomes["served"] >= 1


def test_out_of_memory_while_serving_is_tried_again_on_a_fresh_worker(monkeypatch):
    """The second answer is taken for one that ran out of memory."""
    told, poll = [], WorkerProcess.poll

    def short_of_memory(self):
        messages = poll(self)
        told.extend(m for m in messages if m["reply"] == "run")
        if len(told) == 2 and messages and messages[-1] is told[-1]:
            return [{"reply": "error", "id": told[-1]["id"], "error": "out_of_memory", "message": "no memory"}]
        return messages

    monkeypatch.setattr(WorkerProcess, "poll", short_of_memory)
    trace = lab.run(plan(6), lab.Temporal(), Cpu(), 1500, seed=2, drain_ms=60_000)
    check_books(trace)
    assert (trace.requests["outcome"] == "served").all()
    assert trace.events["kind"].tolist() == ["out of memory", "retried", "worker ready"]


def test_a_network_that_does_not_fit_in_memory_is_refused_at_the_start():
    with pytest.raises(WorkerError, match=r"squeezenet1_1 .*out of memory"):
        lab.run(plan(6), lab.Temporal(), Cpu(), 1000, options={"memory_mib": 1})
    assert not children()


def test_a_policy_error_hands_back_the_trace_and_leaves_no_process():
    class Bad(Policy):
        def decide(self, state):
            return [Launch(s.name, 1, 1) for s in state.services if s.ready]

    with pytest.raises(lab.PolicyError, match=r"Bad at .*gpu_pct must be one of the prepared shares") as caught:
        lab.run(plan(6), Bad(), Cpu(), 1000, seed=1)
    assert len(caught.value.trace.requests) > 0
    assert not children()


def test_a_policy_that_never_launches_ends_with_the_drain_time():
    class Idle(Policy):
        def decide(self, state):
            return [Wake(state.now_ms + 50)]

    trace = lab.run(plan(6), Idle(), Cpu(), 1000, seed=1, drain_ms=200)
    assert (trace.requests["outcome"] == "unserved").all()
    assert trace.events["kind"].tolist() == ["stopped"]


def test_ctrl_c_leaves_no_process_behind(tmp_path):
    script = tmp_path / "runs.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys
            import pandas as pd
            import dstack_lab as lab
            shares = lab.devices.Cpu().shares()
            rows = [{"model": "squeezenet1_1", "batch": b, "gpu_pct": g, "service_ms": 20.0 * b} for b in (1, 2) for g in shares]
            profile = lab.Profile(pd.DataFrame(rows), lab.Provenance("measured", "d", "m"))
            plan = lab.optimize([lab.Service("squeezenet1_1", 500, lab.Poisson(5))], profile)
            class Loud(lab.Temporal):
                def decide(self, state):
                    print("turn", flush=True)
                    return super().decide(state)
            lab.run(plan, Loud(), lab.devices.Cpu(), 60_000, seed=1)
            """
        )
    )
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "turn\n"
        pids = _workers_of(process.pid)
        assert pids
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in err
    end = time.monotonic() + 20
    while any(_is_worker(p) for p in pids) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(_is_worker(p) for p in pids)


def _workers_of(parent: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True, check=False).stdout
    return [int(p) for p in found.split() if _is_worker(int(p))]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "cpu"}, "device = 'cpu'"),
        ({"duration_ms": 0}, "duration_ms = 0"),
        ({"drain_ms": -1}, "drain_ms = -1"),
        ({"policy": None}, "policy = None"),
    ],
)
def test_bad_arguments_are_named_before_anything_starts(arguments, message):
    good = {"plan": plan(6), "policy": lab.Temporal(), "device": Cpu(), "duration_ms": 100}
    with pytest.raises(ValueError, match=message):
        lab.run(**{**good, **arguments})
    assert not children()


class Double:
    """Stands for a worker in the books of leases."""

    def __init__(self, pid: int, threads: int, cores: tuple[int, ...] = ()) -> None:
        self.pid, self.threads, self.cores = pid, threads, cores

    def pin(self, cores) -> None:
        self.cores = tuple(cores)


def test_leases_are_disjoint_and_keep_a_worker_where_it_was():
    leases = CoreLeases(range(4))
    a, b, c = Double(1, 2), Double(2, 1), Double(3, 2)
    leases.take(a)
    leases.take(b)
    assert not set(a.cores) & set(b.cores)
    with pytest.raises(RuntimeError, match="needs 2 cores, 1 are free"):
        leases.take(c)
    with pytest.raises(RuntimeError, match="holds cores already"):
        leases.take(a)
    before = b.cores
    leases.give(a)
    leases.give(b)
    leases.give(b)
    leases.take(b)
    assert b.cores == before
    leases.take(c)
    assert not set(b.cores) & set(c.cores)


def test_oversubscribed_leases_fill_the_cores_evenly():
    leases = CoreLeases(range(4), oversubscribe=True)
    workers = [Double(pid, 3) for pid in range(4)]
    for worker in workers:
        leases.take(worker)
    held = [core for worker in workers for core in worker.cores]
    assert [held.count(core) for core in range(4)] == [3, 3, 3, 3]
    with pytest.raises(RuntimeError, match="holds cores already"):
        leases.take(workers[0])
    for worker in workers:
        leases.give(worker)
    leases.take(workers[0])
    with pytest.raises(RuntimeError, match=r"needs 5 cores, 4 are free"):
        leases.take(Double(9, 5))


def test_batches_of_all_services_at_once_on_the_same_cores():
    trace = lab.run(plan(20, 20), lab.Triton(), Cpu(oversubscribe=True), 1500, seed=2, drain_ms=30_000)
    assert (trace.requests["outcome"] == "served").all()
    assert (trace.launches["gpu_pct"] == 100).all()
    assert any("oversubscribed shares" in mark for mark in trace.provenance.marks)
    assert trace.launches["batch"].sum() == len(trace.requests)
    for _, mine in trace.launches.groupby("service", observed=False):  # one instance of each network
        assert (mine["start_ms"].to_numpy()[1:] >= mine["end_ms"].to_numpy()[:-1]).all()


def test_batches_of_all_services_at_once_need_an_oversubscribed_device():
    with pytest.raises(ValueError, match=r"device = Cpu\(.*must be one with oversubscribe=True for Triton"):
        lab.run(plan(20, 20), lab.Triton(), Cpu(), 1500, seed=2)


def test_a_run_whose_workers_had_half_of_their_cores_says_so():
    told = [{"cpu_ms": 5.0, "worker_ms": 10.0, "cores": 1}, {"cpu_ms": 30.0, "worker_ms": 30.0, "cores": 2}, {"cpu_ms": None}]
    assert _starved(told) == ("starved: workers of one core had 50 % of its time; others used it too",)
    assert _starved([{"cpu_ms": 9.5, "worker_ms": 10.0, "cores": 1}]) == _starved([]) == ()


@pytest.mark.slow
def test_workers_that_share_their_cores_with_others_are_seen():
    """Processes that compute all the time leave a worker of one core a part of it."""
    hungry = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * len(Cpu().slots()))]
    try:
        trace = lab.run(plan(20, 20), lab.Temporal(), Cpu(Cpu().slots()[:1]), 1500, seed=2, drain_ms=60_000)
    finally:
        for process in hungry:
            process.kill()
            process.wait()
    assert any(mark.startswith("starved: workers of one core had ") for mark in trace.provenance.marks)
