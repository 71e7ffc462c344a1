"""The worker process: its answers, its place, and every way it can end."""

import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstack_lab import worker as worker_file
from dstack_lab.devices.base import WorkerDied, WorkerFailed, WorkerTimeout
from dstack_lab.devices.process import WorkerProcess
from dstack_lab.protocol import Lines, encode

#: Networks whose answers tell about the process they run in, or that misbehave on demand.
NETWORKS = '''
import os, sys, torch

class Spy(torch.nn.Module):
    """Position 0..7 of the largest output is the class: each input asks one question."""
    def forward(self, x):
        cores = sorted(os.sched_getaffinity(0))
        facts = [torch.get_num_threads(), torch.get_num_interop_threads(), int(os.environ["OMP_NUM_THREADS"]),
                 int(os.environ["MKL_NUM_THREADS"]), int(torch.is_inference_mode_enabled()), cores[0]]
        print("chatter that must not reach the messages", flush=True)
        return torch.tensor([[float(facts[int(i)])] for i in x[:, 0]])

class Trouble(torch.nn.Module):
    def forward(self, x):
        kind = int(x[0, 0])
        if kind == 1:
            sys.stderr.write("last words of the network"); sys.stderr.flush(); os._exit(3)
        if kind == 2:
            torch.empty(1 << 31, dtype=torch.uint8).fill_(1)
        if kind == 3:
            raise ValueError("wrong shape")
        return x

def spy(): return Spy(), torch.arange(6.0).reshape(6, 1)
def trouble(): return Trouble(), torch.arange(4.0).reshape(4, 1)
'''


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "networks.py"
    path.write_text(NETWORKS)
    return path


def run(worker, *inputs, **more):
    return worker.ask({"op": "run", "inputs": list(inputs), **more}, 30)


def gone(pid, within_s=5.0):
    """Whether `pid` ends in time; a zombie of a dead parent has ended too."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


# Messages


@given(st.lists(st.dictionaries(st.text(), st.integers() | st.text(), max_size=3), max_size=5), st.integers(1, 7))
def test_messages_survive_any_cut(messages, size):
    data, lines = b"".join(map(encode, messages)), Lines()
    got = [m for i in range(0, len(data), size) for m in lines.feed(data[i : i + size])]
    assert got == messages


@pytest.mark.parametrize("line", [b"{half\n", b"[1]\n", b"\xff\xfe\n"])
def test_a_line_that_is_no_message_is_named(line):
    with pytest.raises(ValueError, match="message = "):
        Lines().feed(line)


class Echo:
    """A backend without torch: answers with the number of inputs, or raises what it was given."""

    def __init__(self, error=None):
        self.error, self.threads, self.batches = error, 1, []

    def load(self):
        return {}

    def set_threads(self, threads):
        self.threads = threads

    def run(self, inputs):
        if self.error:
            raise self.error
        self.batches.append(len(inputs))
        return [[0, float(i)] for i in inputs]


def test_time_stops_at_repeats_and_at_the_limit():
    reply = worker_file.answer(Echo(), {"op": "time", "batch": 3, "repeats": 5})
    assert len(reply["samples_ms"]) == 5
    assert sum(reply["samples_ms"]) == pytest.approx(reply["wall_ms"])
    assert len(worker_file.answer(Echo(), {"op": "time", "batch": 3, "repeats": 10**6, "max_ms": 0})["samples_ms"]) == 1
    assert worker_file.answer(Echo(), {"op": "time", "batch": 1, "repeats": 1, "min_ms": 20})["wall_ms"] >= 20


def test_warm_runs_each_batch_as_often_as_asked():
    backend = Echo()
    assert worker_file.answer(backend, {"op": "warm", "batches": [2, 5], "repeats": 3})["reply"] == "warm"
    assert backend.batches == [2, 2, 2, 5, 5, 5]


def test_threads_can_be_changed_by_a_request():
    backend = Echo()
    reply = worker_file.answer(backend, {"op": "run", "id": [1, "a"], "inputs": [4], "threads": 3})
    assert (backend.threads, reply["id"], reply["outputs"]) == (3, [1, "a"], [[0, 4.0]])


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"op": "dance"}, "op = 'dance': must be one of"),
        ({}, "op = None"),
        ({"op": "run"}, "inputs = None"),
        ({"op": "run", "inputs": []}, "inputs = "),
        ({"op": "run", "inputs": [-1]}, "input = -1"),
        ({"op": "run", "inputs": [0], "threads": 0}, "threads = 0"),
        ({"op": "time", "batch": 0, "repeats": 1}, "batch = 0"),
        ({"op": "time", "batch": 1}, "repeats = None"),
        ({"op": "warm"}, "batches = None"),
    ],
)
def test_a_wrong_request_is_answered_with_its_field(message, words):
    reply = worker_file.answer(Echo(), {**message, "id": 9})
    assert (reply["reply"], reply["error"], reply["id"]) == ("error", "bad_input", 9)
    assert words in reply["message"]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError("no"), "out_of_memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"), "out_of_memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "out_of_memory"),
        (ValueError("the network's own"), "failed"),
        (IndexError("somewhere"), "failed"),
    ],
)
def test_failures_of_the_network_are_told_apart(error, kind):
    assert worker_file.answer(Echo(error), {"op": "run", "inputs": [0]})["error"] == kind


# One real worker


@pytest.mark.slow
def test_answers_are_those_of_the_network_whatever_the_batch():
    import torch

    from dstack_lab import zoo

    network = zoo.load("squeezenet1_1", seed=5)
    pool = network.example(64)[0]
    with torch.inference_mode():
        want = network.module(pool[:6])
    with WorkerProcess("squeezenet1_1", 100, seed=5, batches=(1,)) as worker:
        ready = worker.wait_ready(60)
        assert (ready["pid"], ready["threads"]) == (worker.pid, 1)
        assert ready["versions"]["torch"] == torch.__version__
        together = run(worker, 0, 1, 2, 3, 4, 5)["outputs"]
        alone = [run(worker, i)["outputs"][0] for i in range(6)]
        mixed = run(worker, 5, 64 + 3, 0)["outputs"]
    assert [c for c, _ in together] == want.argmax(1).tolist() == [c for c, _ in alone]
    scores = want.double().mean(1).tolist()
    assert [s for _, s in together] == pytest.approx(scores, rel=1e-4)
    assert [s for _, s in alone] == pytest.approx(scores, rel=1e-4)
    assert [s for _, s in mixed] == pytest.approx([scores[5], scores[3], scores[0]], rel=1e-4)
    assert len(set(scores)) == 6  # the inputs do differ


@pytest.mark.slow
def test_threads_cores_and_output_of_a_worker(networks):
    core = max(os.sched_getaffinity(0))
    mine = os.sched_getaffinity(0)
    with WorkerProcess(f"{networks}:spy", 50, threads=1, cores=[core]) as worker:
        assert os.sched_getaffinity(0) == mine  # lent for the start, then restored
        assert worker.wait_ready(60)["cores"] == [core]
        facts = [s for _, s in run(worker, 0, 1, 2, 3, 4, 5, id="x")["outputs"]]
        assert facts == [1, 1, 1, 1, 1, core]
        os.kill(worker.pid, signal.SIGINT)  # Ctrl-C is not for workers
        assert run(worker, 0, threads=2)["outputs"] == [[0, 2.0]]
        assert worker.poll() == []
        assert worker.receive(0) is None
        pid = worker.pid
    assert gone(pid)
    worker.close()  # twice is fine
    with pytest.raises(WorkerDied, match="was closed"):
        worker.send({"op": "stop"})
    with pytest.raises(WorkerDied, match="was closed"):
        worker.pin([core])
    with pytest.raises(WorkerDied, match="was closed"):
        worker.receive(1)


@pytest.mark.slow
def test_a_worker_survives_an_error_and_a_full_memory(networks):
    with WorkerProcess(f"{networks}:trouble", 100, memory_mib=256) as worker:
        worker.wait_ready(60)
        with pytest.raises(WorkerFailed, match="out of memory") as caught:
            run(worker, 2)
        assert caught.value.kind == "out_of_memory"
        with pytest.raises(WorkerFailed, match="wrong shape") as caught:
            run(worker, 3)
        assert caught.value.kind == "failed"
        assert run(worker, 0)["outputs"] == [[0, 0.0]]
        with pytest.raises(WorkerDied, match=r"exited with status 3.*last words of the network") as died:
            run(worker, 1)
        assert (died.value.exit_code, died.value.signal) == (3, None)
        assert not worker.alive


@pytest.mark.slow
def test_killed_and_hung_workers_are_told_apart(networks):
    with WorkerProcess(f"{networks}:trouble", 100) as worker:
        worker.wait_ready(60)
        os.kill(worker.pid, signal.SIGSTOP)
        with pytest.raises(WorkerTimeout, match=r"no answer to 'run' within 0\.2 s"):
            worker.ask({"op": "run", "inputs": [0]}, 0.2)
        assert worker.alive
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(WorkerDied, match=r"killed by SIGKILL \(out of memory\?") as died:
            worker.receive(5)
        assert (died.value.exit_code, died.value.signal) == (None, signal.SIGKILL)
        with pytest.raises(WorkerDied):
            worker.poll()
        with pytest.raises(WorkerDied):
            worker.send({"op": "run", "inputs": [0]})


@pytest.mark.slow
def test_a_stopped_worker_can_be_closed(networks):
    worker = WorkerProcess(f"{networks}:trouble", 100)
    os.kill(worker.pid, signal.SIGSTOP)
    worker.close(timeout_s=0.1)
    assert gone(worker.pid)


@pytest.mark.slow
def test_a_forgotten_worker_is_ended(networks):
    pid = WorkerProcess(f"{networks}:trouble", 100).pid
    gc.collect()
    assert gone(pid)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "words"),
    [("resnet5000", "network = 'resnet5000': must be one of"), ("no_such_file.py:net", "a file that exists")],
)
def test_an_unknown_network_is_a_value_error(model, words):
    with WorkerProcess(model, 100) as worker, pytest.raises(ValueError, match=words):
        worker.wait_ready(60)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"model": ""}, "model = ''"),
        ({"gpu_pct": 0}, "gpu_pct = 0"),
        ({"threads": 0}, "threads = 0"),
        ({"batches": [0]}, "batch = 0"),
        ({"memory_mib": -1}, "memory_mib = -1"),
        ({"cores": [100000]}, "cores = "),
        ({"cores": []}, "cores = "),
    ],
)
def test_bad_arguments_start_nothing(arguments, words):
    with pytest.raises(ValueError, match=words):
        WorkerProcess(**{"model": "alexnet", "gpu_pct": 100, **arguments})


# The end of the parent

PARENT = """
import sys, threading, time
from dstack_lab.devices.process import WorkerProcess
kept = []
def start(): kept.append(WorkerProcess(sys.argv[1], 100))
if sys.argv[2] == "main":
    start()
else:
    thread = threading.Thread(target=start); thread.start(); thread.join()
kept[0].wait_ready(60)
print(kept[0].pid, flush=True)
time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.parametrize("thread", ["main", "passing"])
def test_a_killed_parent_leaves_no_worker(networks, thread):
    command = [sys.executable, "-c", textwrap.dedent(PARENT), f"{networks}:trouble", thread]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]) as parent:
        try:
            pid = int(parent.stdout.readline())
            if thread == "main":
                os.kill(pid, signal.SIGSTOP)  # even one that cannot notice
        finally:
            parent.kill()
    assert gone(pid)


@pytest.mark.slow
def test_a_worker_outlives_the_thread_that_started_it(networks):
    kept = []

    def start():
        kept.append(WorkerProcess(f"{networks}:trouble", 100))
        kept[0].wait_ready(60)

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    time.sleep(0.2)  # the kernel's signal, were it asked for, would come now
    with kept[0] as worker:
        assert run(worker, 0)["outputs"] == [[0, 0.0]]
