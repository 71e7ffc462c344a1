"""LiveRun: real workers that are watched, stopped at any time, and never left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from jupyter_client.manager import start_new_kernel

import dstack_lab as lab
from dstack_lab.devices import Cpu
from dstack_lab.devices.base import Device
from dstack_lab.panels.stoppable import Stoppable, Stopped

V100 = lab.load_profile("v100-simulated")
#: Enough of a profile to plan for real workers.
ROWS = lab.Profile(V100.of("squeezenet1_1").query("gpu_pct in (50, 100) and batch <= 2"), V100.provenance)


def workers(parent: int) -> list[int]:
    """Worker processes that `parent` started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"dstack_lab.worker" in command and f"--parent={parent}".encode() in command:
            found.append(int(folder.name))
    return found


def comes(true: Callable[[], object], seconds: float = 60) -> bool:
    """Whether something comes true in time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if true():
            return True
        time.sleep(0.02)
    return False


def test_live_run_without_a_second_core_says_so():
    panel = lab.panels.LiveRun()
    panel.device = SimpleNamespace(shares=lambda: (100.0,), describe=lambda: "one core", mechanism="core sets")
    panel.start()
    assert not panel.running
    assert "without a second core" in panel.facts()["message"]


def test_a_device_that_is_not_there_is_words():
    def missing():
        raise RuntimeError("no driver: install one")

    panel = lab.panels.LiveRun(device=SimpleNamespace(shares=missing, describe=missing, mechanism="none"))
    assert "no driver: install one" in panel.facts()["message"]
    panel.start()
    assert not panel.running
    assert "RuntimeError: no driver: install one" in panel.facts()["message"]
    assert "no driver: install one" in panel._repr_mimebundle_()["text/plain"]


@pytest.mark.slow
def test_live_run_runs_real_workers_and_leaves_none_behind():
    panel = lab.panels.LiveRun([lab.Service("squeezenet1_1", 2000, lab.Poisson(3))], ROWS, lab.Temporal(), seconds=2)
    panel.start()
    panel.wait()
    facts = panel.facts()
    assert facts["state"] == "ended", facts
    assert facts["launches"] > 0
    panel.seconds.value = 60.0
    panel.start()
    panel.stop()
    assert not panel.running
    assert panel.facts()["state"].startswith("stopped")
    assert workers(os.getpid()) == []


class Raises(lab.Policy):
    def decide(self, state):
        return 1 / 0


class Lazy(lab.Policy):
    def decide(self, state):
        return []


class Stuck(lab.Policy):
    def __init__(self):
        self.asked, self.let_go = threading.Event(), threading.Event()

    def decide(self, state):
        self.asked.set()
        self.let_go.wait(60)
        return []


@pytest.mark.slow
def test_a_policy_that_fails_on_real_workers_is_words_and_the_panel_goes_on(monkeypatch):
    stuck = Stuck()
    panel = lab.panels.LiveRun([lab.Service("squeezenet1_1", 2000, lab.Poisson(6))], ROWS, [Raises(), Lazy(), stuck], seconds=1)
    panel.start()
    panel.wait()
    assert "failed: PolicyError: Raises raised" in panel.facts()["message"]
    assert "division by zero" in panel.facts()["message"]
    panel.policy.value = "Lazy"
    panel.start()
    panel.wait()
    assert panel.facts()["message"].startswith("Lazy launched nothing: all ")
    assert panel.facts()["p99_ms"] is None
    assert panel.facts()["goodput_rps"] == 0
    panel.policy.value = "Stuck"
    monkeypatch.setattr("dstack_lab.panels.live_run.STOP_S", 0.2)
    panel.start()
    assert stuck.asked.wait(60)
    panel.stop()
    assert "Stuck does not return from decide()" in panel.facts()["message"]
    assert panel.running
    panel.start()
    assert "a run is going on already" in panel.facts()["message"]
    other = lab.panels.LiveRun()
    other.start()
    assert not other.running
    assert "another live run does not end" in other.facts()["message"]
    stuck.let_go.set()
    panel.wait()
    assert workers(os.getpid()) == []


@pytest.mark.slow
def test_two_live_runs_do_not_take_each_other_the_cores():
    service = lab.Service("squeezenet1_1", 2000, lab.Poisson(3))
    first, second = (lab.panels.LiveRun([service], ROWS, lab.Temporal(), seconds=seconds) for seconds in (60, 1))
    first.start()
    second.start()
    assert not first.running
    assert first.facts()["state"].startswith("stopped")
    second.wait()
    assert second.facts()["state"] == "ended"
    assert "ended another live run: two would take" in second.facts()["message"]
    second.seconds.value = 2.0
    assert second.facts()["message"] == ""
    assert workers(os.getpid()) == []


@pytest.mark.slow
def test_a_kernel_that_is_interrupted_or_restarted_leaves_no_worker():
    manager, client = start_new_kernel(kernel_name="python3")
    try:
        asked = client.execute_interactive("import os, dstack_lab as lab", user_expressions={"pid": "os.getpid()"}, timeout=60)
        pid = int(asked["content"]["user_expressions"]["pid"]["data"]["text/plain"])
        # What is asked next must not be aborted with it: a kernel drops what came in before it had dealt with the error.
        client.execute("panel = lab.panels.LiveRun(); panel.start(); panel.wait()", stop_on_error=False)
        assert comes(lambda: workers(pid))
        manager.interrupt_kernel()
        assert client.get_shell_msg(timeout=60)["content"]["ename"] == "KeyboardInterrupt"
        told = {"state": "panel.facts()['state']", "running": "panel.running", "again": "not panel.start_button.disabled"}
        answer = client.execute_interactive("pass", user_expressions=told, timeout=60)["content"]["user_expressions"]
        found = {name: value["data"]["text/plain"] for name, value in answer.items()}
        assert found == {"state": "'stopped before it began'", "running": "False", "again": "True"}
        assert workers(pid) == []
        client.execute_interactive("panel.start()", timeout=60)
        assert comes(lambda: workers(pid))
        manager.restart_kernel()
        assert comes(lambda: not workers(pid))
        client.wait_for_ready(timeout=60)
        again = client.execute_interactive("import dstack_lab as lab; lab.panels.LiveRun().facts()['state']", timeout=60)
        assert again["content"]["status"] == "ok"
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


@pytest.mark.slow
def test_stop_does_not_wait_for_a_measurement():
    panel = lab.panels.LiveRun()
    panel.start()
    assert comes(lambda: workers(os.getpid()))
    for pid in workers(os.getpid()):
        os.kill(pid, signal.SIGSTOP)  # this measurement would end in five minutes, by its time limit
    panel.stop()
    assert panel.facts()["state"] == "stopped before it began"
    assert panel.facts()["message"] == ""
    assert not panel.start_button.disabled
    assert panel.profile is None
    assert workers(os.getpid()) == []


@pytest.mark.slow
def test_workers_end_with_a_kernel_that_is_killed():
    code = "import dstack_lab as lab, time; panel = lab.panels.LiveRun(); panel.start(); time.sleep(300)"
    with subprocess.Popen([sys.executable, "-c", code]) as kernel:
        try:
            assert comes(lambda: workers(kernel.pid))
        finally:
            kernel.kill()
    assert comes(lambda: not workers(kernel.pid))


def test_a_stoppable_device_is_the_device_until_it_is_stopped():
    twin = Stoppable(Cpu())
    assert isinstance(twin, Device)
    assert (twin.name, twin.mechanism, twin.shares(), twin.marks()) == (
        Cpu().name,
        Cpu().mechanism,
        Cpu().shares(),
        Cpu().marks(),
    )
    assert twin.cores_for(100) == Cpu().cores_for(100)
    twin.stop()
    with pytest.raises(Stopped, match="told to stop"):
        twin.start("alexnet", 100)
