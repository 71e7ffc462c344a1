"""Measuring: the stability rule and the bookkeeping on a scripted device, the rest on real workers."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dstack_lab.devices import Cpu, WorkerDied, WorkerFailed, WorkerTimeout
from dstack_lab.points import digest, median_interval
from dstack_lab.profiler import measure


class ScriptedDevice:
    """A device without processes: service time is given by a function, trouble by a list.

    `service_ms(batch, share, n)` is the time of all samples of the n-th window of a point;
    `trouble` is consumed one entry per ``time`` request: None, or the error to raise.
    """

    name = "scripted"
    mechanism = "script"

    def __init__(self, service_ms=lambda batch, share, n: 100 * batch / share, trouble=(), marks=()):
        self.service_ms, self.trouble, self._marks = service_ms, list(trouble), marks
        self.asked, self.started, self.open = [], [], 0
        self.cores = lambda n: 0.8  # that the worker gets in the n-th window

    def shares(self):
        return (25.0, 50.0, 100.0)

    def describe(self):
        return "a script"

    def marks(self):
        return self._marks

    def start(self, model, gpu_pct, cores=None, **options):
        assert self.open == 0, "one worker at a time"
        self.started.append((model, gpu_pct))
        self.open += 1
        return ScriptedWorker(self, model, gpu_pct)


class ScriptedWorker:
    def __init__(self, device, model, gpu_pct):
        self.device, self.model, self.gpu_pct, self.windows = device, model, gpu_pct, 0

    def wait_ready(self, timeout_s):
        return {"reply": "ready"}

    def ask(self, message, timeout_s):
        if message["op"] == "warm":
            self.windows = 0
            return {"reply": "warm"}
        self.device.asked.append((self.model, message["batch"], self.gpu_pct))
        error = self.device.trouble.pop(0) if self.device.trouble else None
        if error:
            raise error
        ms = self.device.service_ms(message["batch"], self.gpu_pct, self.windows)
        self.windows += 1
        if not np.isscalar(ms):  # its samples
            return {"samples_ms": list(ms), "wall_ms": sum(ms), "cpu_ms": sum(ms)}
        repeats = max(message["repeats"], int(message["min_ms"] / ms))
        cores = self.device.cores(self.windows - 1)
        return {"samples_ms": [ms] * repeats, "wall_ms": ms * repeats, "cpu_ms": cores * ms * repeats}

    def kill(self):
        self.device.open -= 1


def points(device):
    return list(dict.fromkeys(device.asked))


def run(device, **options):
    return measure("alexnet", device=device, **{"batches": (1, 2), "progress": False, "seconds_per_point": 1, **options})


def test_every_point_of_the_grid_on_a_fresh_worker_per_share():
    device = ScriptedDevice(marks=("odd: weather",))
    profile = measure(["alexnet", "vgg19"], device=device, batches=(1, 4), progress=False)
    shares = (25, 50, 100)
    assert device.started == [(m, s) for m in ("alexnet", "vgg19") for s in shares]
    assert device.open == 0
    rows = profile.table
    assert list(rows.columns) == (
        ["model", "batch", "gpu_pct", "service_ms", "low_ms", "high_ms", "p99_ms", "spread", "repeats", "effective_cores", "mark"]
    )
    assert [(r.model, r.batch, r.gpu_pct) for r in rows.itertuples()] == (
        [(m, b, s) for m in ("alexnet", "vgg19") for b in (1, 4) for s in shares]
    )
    assert np.allclose(rows["service_ms"], 100 * rows["batch"] / rows["gpu_pct"])
    assert np.allclose(rows["p99_ms"], rows["service_ms"])
    assert (rows["spread"] == 0).all()
    assert np.allclose(rows["effective_cores"], 0.8)
    assert (rows["mark"] == "").all()
    origin = profile.provenance
    assert (origin.kind, origin.device, origin.mechanism, origin.marks) == ("measured", "a script", "script", ("odd: weather",))
    assert "torch" in origin.versions


def test_only_windows_after_it_settled_count():
    drift = [4.0, 2.0, 1.5, 1.49, 1.49]
    rows = run(ScriptedDevice(lambda b, s, n: drift[min(n, 4)]), batches=(1,), shares=(50,)).table
    assert rows["service_ms"].item() == pytest.approx(1.495, abs=0.006)  # of 1.5 and 1.49, within 2 %
    assert rows["mark"].item() == ""


def test_what_never_settles_is_marked():
    profile = run(ScriptedDevice(lambda b, s, n: 1.0 + n % 2), batches=(1,), shares=(25, 50))
    assert list(profile.table["mark"]) == ["unstable", "unstable"]
    assert "unstable: 2 of 2 points" in profile.provenance.marks


def test_half_a_core_for_a_worker_that_was_given_one_is_marked(monkeypatch):
    script, cpu = ScriptedDevice(), Cpu(Cpu().slots()[:1])
    monkeypatch.setattr(Cpu, "start", lambda self, *where, **how: script.start(*where, **how))
    profile = run(cpu)
    assert list(profile.table["mark"]) == ["starved", "starved"]  # the script uses 0.8 cores
    assert "starved: 2 of 2 points" in profile.provenance.marks


def on_one_core(monkeypatch, script, **options):
    """The only point of a script that is given one core."""
    monkeypatch.setattr(Cpu, "start", lambda self, *where, **how: script.start(*where, **how))
    (row,) = run(Cpu(Cpu().slots()[:1]), batches=(1,), shares=(100,), **options).table.to_dict("records")
    return row


def test_windows_in_which_others_had_the_cores_do_not_count(monkeypatch):
    """Twice as slow while starved, in the first two windows and in the fourth."""
    hungry = {0, 1, 3}
    script = ScriptedDevice(lambda b, s, n: 20.0 if n in hungry else 10.0)
    script.cores = lambda n: 0.5 if n in hungry else 1.0
    row = on_one_core(monkeypatch, script)
    assert (row["service_ms"], row["core_ms"], row["mark"]) == (10.0, pytest.approx(10), "")
    assert row["effective_cores"] == pytest.approx(1.0)
    assert len(script.asked) == 5  # two that agree and had their core


def test_a_starved_point_is_given_twice_the_time_and_then_kept_with_its_mark(monkeypatch):
    script = ScriptedDevice(lambda b, s, n: 20.0)
    script.cores = lambda n: 0.5
    row = on_one_core(monkeypatch, script)
    assert (row["service_ms"], row["core_ms"], row["mark"]) == (20.0, pytest.approx(10), "starved")
    assert len(script.asked) == 13  # of 160 ms each, until 2 s are over


def test_threads_that_wait_for_each_other_do_not_cost_time(monkeypatch):
    """Of several cores 80 % used may be all that a network can use: the point ends when it is stable, with its mark."""
    script = ScriptedDevice(lambda b, s, n: 20.0)
    monkeypatch.setattr(Cpu, "start", lambda self, *where, **how: script.start(*where, **how))
    monkeypatch.setattr(Cpu, "cores_for", lambda self, gpu_pct: 2)
    script.cores = lambda n: 1.6
    (row,) = run(Cpu(), batches=(1,), shares=(100,)).table.to_dict("records")
    assert (row["mark"], "core_ms" in row, len(script.asked)) == ("starved", False, 2)


# The interval of the median


@given(st.integers(0, 200), st.sampled_from([0.8, 0.9, 0.95, 0.99]))
def test_the_interval_is_that_of_scipy_s_quantile_test(n, level):
    """The same order statistics, found by another route: both tails hold half of what is left out."""
    samples = np.random.default_rng(n).permutation(n) + 1.0
    low, high = median_interval(samples, level)
    if n == 0:
        assert (low, high) == (-np.inf, np.inf)
        return
    told = stats.quantile_test(samples, q=0, p=0.5).confidence_interval(level)
    assert low == (told.low if np.isfinite(told.low) else -np.inf)
    assert high == (told.high if np.isfinite(told.high) else np.inf)


@pytest.mark.parametrize("n", [6, 7, 10, 25, 200])
@pytest.mark.parametrize("draw", ["lognormal", "exponential", "uniform"])
def test_the_interval_holds_the_median_as_often_as_it_says(n, draw):
    """Exact coverage is sum of binomials; 4000 draws find it within 4 standard errors. 5 samples leave out 6 %."""
    rng = np.random.default_rng(n)
    truth = {"lognormal": 1.0, "exponential": np.log(2), "uniform": 0.5}[draw]
    found = [median_interval(getattr(rng, draw)(size=n)) for _ in range(4000)]
    held = np.mean([low <= truth <= high for low, high in found])
    r = next(k for k in range(n, 0, -1) if stats.binom.cdf(k - 1, n, 0.5) <= 0.025)
    exact = 1 - 2 * stats.binom.cdf(r - 1, n, 0.5)
    assert exact >= 0.95
    assert held == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / 4000))


@pytest.mark.parametrize("n", range(6))
def test_too_few_samples_have_no_interval(n):
    assert median_interval(np.arange(float(n))) == (-np.inf, np.inf)


def test_a_level_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"level = 1: must be above 0 and below 1"):
        median_interval([1.0], 1)


def test_with_an_interval_a_point_is_timed_until_it_is_narrow():
    """Windows of 20 samples whose medians agree at once; their spread is 20 %, so that the interval narrows slowly."""
    rng = np.random.default_rng(3)
    noisy = [10 * (1 + 0.2 * (rng.permutation(20) / 19 - 0.5)) for _ in range(100)]

    def timed(interval, seconds):
        device = ScriptedDevice(lambda b, s, n: noisy[n])
        (row,) = run(device, batches=(1,), shares=(50,), interval=interval, seconds_per_point=seconds).table.to_dict("records")
        assert row["low_ms"] <= row["service_ms"] <= row["high_ms"]
        return len(device.asked), (row["high_ms"] - row["low_ms"]) / row["service_ms"], row["mark"]

    few, wide, mark = timed(None, 60)
    assert (few, mark) == (2, "")
    many, narrow, mark = timed(0.03, 60)
    assert (many > 5, mark) == (True, "")
    assert narrow <= 0.03 < wide
    asked, still_wide, mark = timed(0.03, 0.5)  # three windows of 0.2 s
    assert (asked, mark) == (3, "wide interval")
    assert still_wide > 0.03
    with pytest.raises(ValueError, match="interval = 0: must be a finite number above 0"):
        run(ScriptedDevice(), interval=0)


def test_without_enough_samples_the_interval_is_not_a_number():
    table = run(ScriptedDevice(lambda b, s, n: 100.0), batches=(1,), shares=(50,), seconds_per_point=0.01).table
    assert table["repeats"].item() >= 10
    few = digest([{"samples_ms": [1.0, 2.0], "cpu_ms": 3.0, "wall_ms": 3.0}], True, None, 0.1)
    assert np.isnan([few["low_ms"], few["high_ms"]]).all()
    assert few["mark"] == "wide interval, few repeats"


def test_a_slow_batch_is_still_timed_twice():
    table = run(ScriptedDevice(lambda b, s, n: 10_000.0), batches=(1,), shares=(100,), seconds_per_point=0.01).table
    assert table["repeats"].item() >= 2


def test_a_worker_that_dies_once_is_replaced():
    device = ScriptedDevice(trouble=[None, WorkerDied("gone"), None])
    profile = run(device, shares=(50,))
    assert device.started == [("alexnet", 50)] * 2
    assert len(profile.table) == 2
    assert device.open == 0


@pytest.mark.parametrize("error", [WorkerDied("gone"), WorkerTimeout("silent"), WorkerFailed("no", "failed")])
def test_a_point_that_fails_twice_is_named(error):
    device = ScriptedDevice(trouble=[None, None, error, error])
    with pytest.raises(RuntimeError, match=r"measuring alexnet at 50 %, batch 2 failed on two workers: "):
        run(device, shares=(50,))
    assert device.open == 0


def test_a_batch_too_large_for_memory_has_no_row_but_a_mark(tmp_path):
    full = WorkerFailed("full", "out_of_memory")
    device = ScriptedDevice(trouble=[None, None, full])
    profile = run(device, shares=(50,), folder=tmp_path)
    assert list(profile.table["batch"]) == [1]
    assert profile.provenance.marks == ("out of memory: alexnet at 50 %, batch 2",)
    again = ScriptedDevice()
    assert len(run(again, shares=(50,), folder=tmp_path).table) == 2  # with more memory it may fit
    assert points(again) == [("alexnet", 2, 50)]
    with pytest.raises(RuntimeError, match="no point could be measured: out of memory"):
        run(ScriptedDevice(trouble=[full]), shares=(50,), batches=(1,))


# Resuming


def test_finished_points_are_not_measured_again(tmp_path):
    died = WorkerDied("gone")
    first = ScriptedDevice(trouble=[None] * 4 + [died, died])
    with pytest.raises(RuntimeError):
        run(first, folder=tmp_path, batches=(1, 2, 4), shares=(50,))
    second = ScriptedDevice(lambda b, s, n: 7.0)
    profile = run(second, folder=tmp_path, batches=(1, 2, 4), shares=(50,))
    assert points(second) == [("alexnet", 4, 50)]
    assert list(profile.table["service_ms"]) == [2, 4, 7]
    third = ScriptedDevice()
    assert run(third, folder=tmp_path, batches=(1, 2, 4), shares=(50,)).table.equals(profile.table)
    assert (third.asked, third.started) == ([], [])


def test_another_device_is_another_measurement(tmp_path):
    run(ScriptedDevice(), folder=tmp_path)
    other = ScriptedDevice()
    other.describe = lambda: "another script"
    run(other, folder=tmp_path)
    assert len(points(other)) == 6


def test_a_line_cut_short_is_measured_again(tmp_path):
    run(ScriptedDevice(), folder=tmp_path, shares=(50,))
    path = tmp_path / "points.jsonl"
    path.write_text(path.read_text()[:-20])
    device = ScriptedDevice()
    run(device, folder=tmp_path, shares=(50,))
    assert points(device) == [("alexnet", 2, 50)]
    assert [json.loads(line)["batch"] for line in path.read_text().splitlines()] == [1, 2]


@pytest.mark.parametrize("line", ["{broken", '{"model": "alexnet"}', "[]", ""])
def test_a_damaged_line_is_named(tmp_path, line):
    (tmp_path / "points.jsonl").write_text(f"{line}\n")
    with pytest.raises(ValueError, match=r"line 1 of points\.jsonl"):
        run(ScriptedDevice(), folder=tmp_path)


class ScriptedGpu(ScriptedDevice):
    """Says at what clock it computes; from the second window on the power cap holds it down."""

    reads = 0

    def conditions(self):
        self.reads += 1
        return {"clock_mhz": 1980 - 100 * self.reads, "power_w": 700.0, "throttled": ["power cap"] if self.reads > 1 else []}

    def start(self, *where, **how):
        worker = super().start(*where, **how)
        worker.granted_sms, ask = 66, worker.ask

        def slowly(message, timeout_s):
            time.sleep(message.get("min_ms", 0) / 1000)
            return ask(message, timeout_s) | {"gpu_ms": [1.25]}

        worker.ask = slowly
        return worker


def test_a_row_of_a_gpu_says_sms_clock_power_and_what_throttled_it():
    profile = run(ScriptedGpu(), batches=(1,), shares=(50,), seconds_per_point=1.2)  # windows of 0.2 s, read in their middle
    (row,) = profile.table.to_dict("records")
    assert (row["effective_sms"], row["gpu_ms"], row["clock_mhz"], row["power_w"]) == (66, 1.25, 1830, 700)
    assert row["mark"] == "throttled"
    assert "throttled: 1 of 1 points" in profile.provenance.marks


# Budget


@pytest.mark.parametrize("again", [False, True])
def test_a_time_budget_stops_between_points_and_says_what_is_left(tmp_path, monkeypatch, again):
    clock = iter(range(1000))
    monkeypatch.setattr("dstack_lab.profiler.time.monotonic", lambda: next(clock))
    first = ScriptedDevice()
    profile = run(first, folder=tmp_path, budget_s=3)
    assert len(profile.table) == len(points(first)) == 2
    assert "time budget: 4 of 6 points are left after 3 s: call again with the same folder" in profile.provenance.marks
    if again:
        whole = run(ScriptedDevice(), folder=tmp_path, budget_s=900)
        assert len(whole.table) == 6
        assert whole.provenance.marks == ()


def test_a_time_budget_too_short_for_any_point():
    with pytest.raises(RuntimeError, match="no point could be measured: time budget: 6 of 6 points are left"):
        run(ScriptedDevice(), budget_s=1e-9)


def test_a_budget_limits_the_points():
    device = ScriptedDevice(lambda b, s, n: (5 + b) / min(s, 60))
    profile = run(device, batches=(1, 2, 4, 8, 16), budget=6)
    assert len(points(device)) == 6 == len(profile.table)
    assert any(mark.startswith("budget: alexnet: 6 points; service time to about") for mark in profile.provenance.marks)
    assert set(points(device)) <= {("alexnet", b, s) for b in (1, 2, 4, 8, 16) for s in (25, 50, 100)}


# Bad input


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"models": "resnet5000"}, "network = 'resnet5000'"),
        ({"models": []}, "models = "),
        ({"models": [3]}, "network = 3"),
        ({"batches": (1, 0)}, "batch = 0"),
        ({"device": "cpu"}, "device = 'cpu': must be a device"),
        ({"batches": ()}, "batches = "),
        ({"shares": (40,)}, "share = 40: .*25, 50, 100"),
        ({"shares": ()}, "shares = "),
        ({"seconds_per_point": 0}, "seconds_per_point = 0"),
        ({"timeout_s": -1}, "timeout_s = -1"),
        ({"budget": 1}, "budget = 1"),
        ({"budget_s": 0}, "budget_s = 0"),
        ({"seed": -1}, "seed = -1"),
    ],
)
def test_bad_input_starts_nothing(options, words):
    device = ScriptedDevice()
    with pytest.raises(ValueError, match=words):
        measure(**{"models": "alexnet", "device": device, "progress": False, **options})
    assert device.started == []


# Real workers

NETWORK = """
import os, pathlib, time, torch
class Net(torch.nn.Module):
    def forward(self, x):
        marker = pathlib.Path(__file__).with_name("die")
        if marker.exists():
            marker.unlink()
            os._exit(9)
        time.sleep(0.001 * len(x))
        return x
def net(): return Net(), torch.zeros(8, 4)
"""


@pytest.fixture
def network(tmp_path):
    (tmp_path / "net.py").write_text(NETWORK)
    return f"{tmp_path}/net.py:net"


@pytest.mark.slow
def test_real_workers_are_timed_and_replaced_when_they_die(network, tmp_path):
    (tmp_path / "die").touch()  # the first worker dies at its first batch; the second serves
    device = Cpu(Cpu().slots()[:1])
    table = measure(network, device=device, batches=(1, 8), seconds_per_point=0.4, progress=False).table
    one, eight = table["service_ms"]
    assert one >= 1  # the network sleeps 1 ms per input: no machine is faster
    assert eight >= 8
    assert table["mark"].str.contains("starved").all()  # sleeping is not computing
    assert (table["model"] == network).all()


INTERRUPTED = """
import sys
from dstack_lab.devices import Cpu
from dstack_lab.points import digest, median_interval
from dstack_lab.profiler import measure
measure(sys.argv[1], device=Cpu(Cpu().slots()[:1]), batches=(1, 2), seconds_per_point=120, progress=False, folder=sys.argv[2])
"""


def children(pid):
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(stat.parent.name))
    return found


@pytest.mark.slow
def test_interrupting_leaves_no_process(tmp_path):
    # The samples never agree, so measuring goes on until it is interrupted.
    text = NETWORK.replace("0.001 * len(x)", "0.01 * (1 + time.monotonic() % 7)")
    (tmp_path / "net.py").write_text(text)
    command = [sys.executable, "-c", INTERRUPTED, f"{tmp_path}/net.py:net", str(tmp_path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, cwd=Path(__file__).parents[1]) as parent:
        end = time.monotonic() + 60
        while not (workers := children(parent.pid)) and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(3)  # torch is being imported, or batches run: either way
        parent.send_signal(signal.SIGINT)
        words = parent.stderr.read().decode()
        assert parent.wait(20) != 0
    assert "KeyboardInterrupt" in words
    assert len(workers) == 1
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    for line in (tmp_path / "points.jsonl").read_text().splitlines() if (tmp_path / "points.jsonl").exists() else []:
        json.loads(line)
