"""LiveRun: real workers that are watched, stopped at any time, and never left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

import dstack_lab as lab
from dstack_lab.devices import Cpu
from dstack_lab.devices.base import Device
from dstack_lab.panels.stoppable import Stoppable, Stopped

V100 = lab.load_profile("v100-simulated")


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


@pytest.mark.slow
def test_live_run_runs_real_workers_and_leaves_none_behind():
    rows = lab.Profile(
        V100.table[(V100.table["model"] == "squeezenet1_1") & V100.table["gpu_pct"].isin([50, 100])].query("batch <= 2"),
        V100.provenance,
    )
    panel = lab.panels.LiveRun([lab.Service("squeezenet1_1", 2000, lab.Poisson(3))], rows, lab.Temporal(), seconds=2)
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
