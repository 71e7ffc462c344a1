"""A process beside a run's loop: what it computes and raises comes back, it dies and is replaced, and it leaves nothing."""

from __future__ import annotations

import os
import pickle
import select
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import slow_planner
from builders import table
from fake_fleet import FakeDevice, open_files
from test_adaptive import Watched
from test_standby import plan as fake_plan

import dstack_lab as lab
from dstack_lab.devices import Cpu
from dstack_lab.helper import Helper
from dstack_lab.helper_process import answer
from dstack_lab.policies import Launch, Policy, adaptive
from dstack_lab.policies.slot_plan import cut_slots
from dstack_lab.work import Work, WorkLost


def told(data: bytes):
    return pickle.loads(answer(data))


class TestWork:
    def test_is_asked_for_its_result_when_it_is_done(self):
        work = Work()
        with pytest.raises(RuntimeError, match="not done"):
            work.result()
        work.end(7)
        assert (work.done, work.result()) == (True, 7)
        work.end(error=KeyError("x"))
        with pytest.raises(KeyError):
            pickle.loads(pickle.dumps(work)).result()

    def test_tables_travel_as_their_array(self):
        made = table(1, 0.5, 40, batch_max=64)
        data = pickle.dumps(made)
        assert len(data) < 1.1 * made.ms.nbytes
        copy = pickle.loads(data)
        assert np.array_equal(copy.ms, made.ms)
        assert copy.at(3, 12.5) == made.at(3, 12.5)
        with pytest.raises(ValueError, match="read-only"):
            copy.ms[0, 0] = 1


class TestAnswer:
    """As given in the helper's process."""

    def test_what_a_function_returns_and_raises(self):
        assert told(pickle.dumps((divmod, (7, 2)))) == (True, (3, 1))
        good, error = told(pickle.dumps((divmod, (7, 0))))
        assert not good
        assert isinstance(error, ZeroDivisionError)
        assert "helper_process.py" in error.__notes__[0]

    def test_what_cannot_travel_is_told_in_words(self):
        _, error = told(pickle.dumps((slow_planner.raises_untold, ())))
        assert (type(error), str(error)) == (RuntimeError, "Untold: one and other")
        good, error = told(pickle.dumps((slow_planner.unpicklable, ())))
        assert not good
        assert "pickle" in str(error)

    def test_what_no_other_process_can_import_names_the_cure(self):
        _, error = told(pickle.dumps((slow_planner.sleeps, ())).replace(b"sleeps", b"sleepz"))
        assert isinstance(error, ValueError)
        assert "into a file that it can import" in str(error)


def helpers() -> set[int]:
    """Children of this process that are a helper's, zombies included."""
    found = subprocess.run(["ps", "-o", "pid=,comm=", "--ppid", str(os.getpid())], capture_output=True, text=True, check=False)
    pids = {int(line.split()[0]) for line in found.stdout.splitlines() if "python" in line}
    return {pid for pid in pids if _is_helper(pid)}


def _is_helper(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        return (
            stat.rpartition(")")[2].split()[0] == "Z" or b"dstack_lab.helper_process" in Path(f"/proc/{pid}/cmdline").read_bytes()
        )
    except OSError:
        return False


def wait_for(helper: Helper, work: Work) -> list[tuple[str, str]]:
    """What happened until the work was done."""
    found = []
    end = time.monotonic() + 120
    while not work.done and time.monotonic() < end:
        select.select([helper], [], [], 1.0)
        found += helper.news()
    assert work.done
    return found


@pytest.mark.slow
class TestHelper:
    def test_computes_elsewhere_one_after_another(self):
        before = open_files()
        with Helper() as helper:
            helper.wait_ready(60)
            first, second = helper.submit(os.getpid), helper.submit(divmod, 7, 0)
            assert not first.done  # until the loop looks
            wait_for(helper, second)
            assert first.result() == helper.pid != os.getpid()
            with pytest.raises(ZeroDivisionError):
                second.result()
            assert helper.submit(lambda: 1).done
            assert helpers() == {helper.pid}
        helper.close()
        assert not helpers()
        assert open_files() == before

    def test_stands_back_and_brings_nothing_large_along(self):
        with Helper() as helper:
            helper.wait_ready(60)
            heavy = helper.submit(eval, "[m for m in ('torch', 'plotly', 'matplotlib') if m in __import__('sys').modules]")
            nice = helper.submit(os.nice, 0)
            wait_for(helper, nice)
            assert heavy.result() == []
            assert nice.result() > os.nice(0)

    def test_one_that_died_idle_is_replaced(self):
        with Helper() as helper:
            helper.wait_ready(60)
            os.kill(helper.pid, signal.SIGKILL)
            os.waitid(os.P_PID, helper.pid, os.WEXITED | os.WNOWAIT)
            work = helper.submit(os.getpid)
            [(kind, detail)] = wait_for(helper, work)
            assert kind == "helper died"
            assert "SIGKILL" in detail
            assert work.result() == helper.pid
            assert helpers() == {helper.pid}

    def test_what_kills_it_twice_is_given_up_and_the_rest_goes_on(self):
        with Helper() as helper:
            bad, good = helper.submit(slow_planner.dies), helper.submit(divmod, 7, 2)
            events = wait_for(helper, good)
            assert [kind for kind, _ in events] == ["helper died"] * 2
            assert "tried again" in events[0][1]
            assert "given up" in events[1][1]
            with pytest.raises(WorkLost, match="SIGKILL, twice"):
                bad.result()
            assert good.result() == (3, 1)

    def test_one_that_does_not_start_says_why(self, monkeypatch):
        monkeypatch.setattr(sys, "executable", "/bin/false")
        with Helper() as helper, pytest.raises(RuntimeError, match=r"exited with status 1; policy.works_apart = False"):
            helper.wait_ready(60)
        assert not helpers()

    def test_ends_in_the_middle_of_its_work(self):
        with Helper() as helper:
            helper.wait_ready(60)
            work = helper.submit(exec, "while True: pass")
        assert not work.done
        assert not helpers()

    @pytest.mark.parametrize("deed", [signal.SIGINT, signal.SIGKILL], ids=["interrupted", "killed"])
    @pytest.mark.parametrize("where", ["main", "thread"])
    def test_does_not_outlive_its_parent(self, deed, where, tmp_path):
        """Wherever it was started, and though it computes."""
        script = tmp_path / "begins.py"
        script.write_text(
            textwrap.dedent(
                f"""
                import threading
                from dstack_lab.helper import Helper
                def go():
                    with Helper() as helper:
                        helper.wait_ready(60)
                        helper.submit(exec, "while True: pass")
                        print(helper.pid, flush=True)
                        threading.Event().wait(600)
                if {where == "main"}:
                    go()
                else:
                    thread = threading.Thread(target=go, daemon=True)
                    thread.start()
                    thread.join(600)
                """
            )
        )
        with subprocess.Popen(
            [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as parent:
            pid = int(parent.stdout.readline())
            assert _is_helper(pid)
            parent.send_signal(deed)
            parent.wait(60)
        end = time.monotonic() + 60
        while _is_helper(pid) and time.monotonic() < end:
            time.sleep(0.05)
        assert not _is_helper(pid)


class Tells(Policy):
    """Serves what waits and asks for a process's number."""

    def reset(self, plan):
        self.work = None

    def decide(self, state):
        if self.work is None:
            self.work = state.apart(os.getpid)
        return [Launch(v.name, 10, 1) for v in state.services if v.waiting and not v.in_flight]


@pytest.mark.parametrize("apart", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_ones_own_policy_says_whether_it_works_apart(apart):
    policy = Tells()
    policy.works_apart = apart
    lab.simulate(fake_plan(50), policy, 100)
    assert policy.work.result() == os.getpid()
    lab.run(fake_plan(50), policy, FakeDevice(), 2000)
    assert policy.work.done
    assert (policy.work.result() != os.getpid()) == apart
    assert not helpers()


# D-STACK that plans beside a run


def moving(rate: float = 300):
    """A plan for 40 and 40 requests/s of networks that take 2 ms; at 0.6 s the first gets `rate`."""
    step = lab.Steps(((0, 40), (600, rate)))
    return replace(fake_plan(40, 40), services=(lab.Service("a", 60, step), lab.Service("b", 60, lab.Poisson(40))))


def serve(policy, until=lambda _: False, duration_ms=120_000.0, device=None, made=None):
    """Run until something is true of the books, which are looked at a few times a second."""
    before = open_files()
    device, made = device or FakeDevice(), made or moving()
    try:
        return lab.run(made, policy, device, duration_ms, seed=1, watch=lambda ledger: not until(ledger))
    finally:
        assert not helpers()
        assert open_files() == before


@pytest.mark.slow
class TestAdaptive:
    def test_launches_go_on_while_it_plans(self, monkeypatch):
        """A planner sleeps half a second, eight of the SLO."""
        monkeypatch.setattr(adaptive, "cut_slots", slow_planner.sleeps)
        policy = Watched(learns=False)
        trace = serve(policy, lambda _: policy.replanned_ms)
        asked_ms, ready_ms = policy.requests[0][0], policy.replanned_ms[0]
        assert ready_ms - asked_ms >= 500
        starts = trace.launches["start_ms"]
        assert ((starts > asked_ms) & (starts < ready_ms)).sum() > 20
        assert policy.rates["a"] > 100

    def test_an_error_stops_the_run_as_in_a_simulation(self, monkeypatch):
        monkeypatch.setattr(adaptive, "cut_slots", slow_planner.fails)
        for run in (serve, lambda policy: lab.simulate(moving(), policy, 2500, seed=1)):
            policy = Watched(learns=False)
            with pytest.raises(lab.PolicyError, match=r"Watched raised at \d+\.\d* ms: KeyError\('oops'\)") as caught:
                run(policy)
            assert len(policy.requests) == 1
            assert len(caught.value.trace.launches) > 10

    def test_a_planner_that_is_killed_is_replaced_and_the_plan_comes(self, monkeypatch, tmp_path):
        monkeypatch.setenv(slow_planner.MARK, str(tmp_path / "died"))
        monkeypatch.setattr(adaptive, "cut_slots", slow_planner.dies_once)
        policy = Watched(learns=False)
        trace = serve(policy, lambda _: policy.replanned_ms)
        died = trace.events[trace.events["kind"] == "helper died"]
        assert len(died) == 1
        assert policy.replanned_ms[0] > died["time_ms"].iloc[0] > policy.requests[0][0]

    def test_where_none_survives_the_old_plan_goes_on_and_the_trace_says_so(self, monkeypatch):
        monkeypatch.setattr(adaptive, "cut_slots", slow_planner.dies)
        policy = Watched(learns=False)

        def lost(ledger):
            """It was given up 0.2 s ago."""
            died = [ms for ms, kind, *_ in ledger.events if kind == "helper died"]
            return len(died) > 1 and ledger.state.now_ms > died[1] + 200

        trace = serve(policy, lost)
        assert policy.replanned_ms == []
        died = trace.events.loc[trace.events["kind"] == "helper died", "time_ms"]
        assert len(died) >= 2
        assert (trace.launches["start_ms"] > died.iloc[1]).sum() > 20

    def test_a_policy_can_be_copied_and_used_again_whatever_came_of_its_plan(self, monkeypatch):
        """The run ends before the plan is there."""
        monkeypatch.setattr(adaptive, "cut_slots", slow_planner.sleeps)
        policy = Watched(learns=False)
        serve(policy, duration_ms=1000.0)
        monkeypatch.setattr(adaptive, "cut_slots", cut_slots)
        fresh = lab.simulate(moving(), Watched(learns=False), 2500, seed=3)
        for one in (pickle.loads(pickle.dumps(policy)), policy):
            again = lab.simulate(moving(), one, 2500, seed=3)
            assert again.requests.equals(fresh.requests)
            assert again.launches.equals(fresh.launches)

    def test_on_cores(self, monkeypatch):
        """Five times as many requests come from 1 s on; each takes a core some ten milliseconds."""
        monkeypatch.setattr(adaptive, "cut_slots", slow_planner.sleeps)
        shares = Cpu().shares()
        rows = [{"model": "squeezenet1_1", "batch": b, "gpu_pct": g, "service_ms": 30.0 * b} for b in (1, 2, 4) for g in shares]
        profile = lab.Profile(pd.DataFrame(rows), lab.Provenance("measured", "this machine", "core sets"))
        made = lab.optimize([lab.Service("squeezenet1_1", 300, lab.Poisson(5))], profile)
        made = replace(made, services=(lab.Service("squeezenet1_1", 300, lab.Steps(((0, 5), (1000, 25)))),))
        policy = Watched(learns=False)
        trace = serve(policy, lambda _: policy.replanned_ms, device=Cpu(), made=made)
        asked_ms, ready_ms = policy.requests[0][0], policy.replanned_ms[0]
        assert ready_ms - asked_ms >= 500
        starts = trace.launches["start_ms"]
        assert ((starts > asked_ms) & (starts < ready_ms)).sum() >= 2
