"""NVIDIA MPS without a GPU: a fake control program, a stub NVML, and workers that only tell what they were given."""

import gc
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from dstack_lab.cuda_backend import PRECISIONS
from dstack_lab.devices import Device, mps_daemon, mps_keeper, nvml
from dstack_lab.devices.base import WorkerFailed
from dstack_lab.devices.cuda_errors import cure_of, with_cure
from dstack_lab.devices.mps import Mps
from dstack_lab.devices.mps_daemon import MpsDaemon, MpsError
from dstack_lab.devices.mps_worker import SmLeases, clients
from dstack_lab.devices.process import WorkerProcess
from dstack_lab.worker import parse

FAKES = Path(__file__).parent / "fakes"
H200 = Mps(sms=132)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with the fake programs; its environment can be changed by calling it. Nothing may be left behind."""
    monkeypatch.setenv("PATH", f"{FAKES}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_MPS_LOG", str(tmp_path / "asked"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    monkeypatch.syspath_prepend(str(FAKES))
    roots = []
    make = mps_daemon.tempfile.mkdtemp
    monkeypatch.setattr(mps_daemon.tempfile, "mkdtemp", lambda **where: roots.append(make(**where)) or roots[-1])

    def change(**env):
        for name, value in env.items():
            monkeypatch.setenv(name, value if isinstance(value, str) else json.dumps(value))

    change.asked = lambda: (tmp_path / "asked").read_text().split("\n")[:-1]
    change.roots = roots
    yield change
    Mps().stop()
    assert nothing_left(roots)
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)


def nothing_left(roots, within_s=5.0):
    """Whether neither a folder nor a process that was told one is there."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        lines = [p.read_bytes().decode(errors="replace") for p in processes()]
        if not [r for r in roots if Path(r).exists() or any(r in line for line in lines)]:
            return True
        time.sleep(0.05)
    return False


def processes():
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            path.read_bytes()
        except OSError:
            continue
        yield path


# The daemon


def test_a_daemon_starts_serves_and_leaves_nothing(machine):
    daemon = MpsDaemon()
    assert daemon.alive
    assert resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)[0] >= min(16_384, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    assert mps_keeper.lives(daemon.server)
    assert len(f"{daemon.root}/p/control") < 100  # of a socket's path
    assert daemon.terminate_client(1234)
    server, pid = daemon.server, daemon.pid
    daemon.quit()
    daemon.quit()
    assert not daemon.alive
    assert not mps_keeper.lives(pid)
    assert not mps_keeper.lives(server)
    assert nothing_left(machine.roots, 0.5)
    asked = machine.asked()
    assert asked[:2] == ["-d ", f"start_server -uid {os.getuid()}"]
    assert asked[-2:] == [f"terminate_client {server} 1234", "quit -t 10"]


@pytest.mark.parametrize(
    ("mood", "words"),
    [
        ("status244", r"cannot load libcuda\.so\.1 \(exit status 244\): install the NVIDIA driver"),
        ("status1", r"-d ended with status 1: its log says: An instance of this daemon is already running"),
        ("inactive", r"not ACTIVE after 0\.3 s \(INITIALIZING\): its log says: server still starting"),
        ("fault", "in FAULT: end every program on this GPU"),
        ("refuses", "refused 'start_server -uid .*': Permission denied"),
    ],
)
def test_a_daemon_that_does_not_serve_is_explained_and_removed(machine, mood, words):
    machine(FAKE_MPS=mood)
    with pytest.raises(MpsError, match=words):
        MpsDaemon(timeout_s=0.3)
    assert nothing_left(machine.roots, 0.5)


@pytest.mark.slow
def test_a_daemon_that_will_not_quit_is_ended(machine, monkeypatch):
    machine(FAKE_MPS="stubborn")
    daemon = MpsDaemon()
    pids = daemon.pid, daemon.server
    daemon.quit()
    assert not any(map(mps_keeper.lives, pids))


def test_a_forgotten_daemon_quits(machine):
    pid = MpsDaemon().pid
    gc.collect()
    assert not mps_keeper.lives(pid)


OWNER = """import os, time; from dstack_lab.devices.mps_daemon import MpsDaemon
d = MpsDaemon(); print(d.root, flush=True); {}"""


@pytest.mark.parametrize(
    "end", ["pass", "raise SystemExit(3)", "1 / 0", "os.kill(os.getpid(), 9)", "os.kill(os.getpid(), 15)", "os._exit(1)"]
)
def test_a_daemon_ends_with_its_owner_however_that_ends(machine, end):
    command = [sys.executable, "-c", OWNER.format(end)]
    root = subprocess.run(command, capture_output=True, text=True, cwd=FAKES.parents[1], check=False).stdout.strip()
    assert root.startswith("/tmp/mps")
    assert nothing_left([root])


def test_ctrl_c_ends_the_daemon_in_order(machine):
    command = [sys.executable, "-c", OWNER.format("time.sleep(60)")]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=FAKES.parents[1], start_new_session=True
    ) as owner:
        root = owner.stdout.readline().strip()
        os.killpg(owner.pid, signal.SIGINT)  # as a terminal does
    assert nothing_left([root])
    assert machine.asked()[-1] == "quit -t 10"


def test_missing_programs_are_named_with_the_cure(machine, monkeypatch, tmp_path):
    monkeypatch.setattr(mps_daemon, "PLACES", (str(tmp_path),))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MpsError, match=r"nvidia-cuda-mps-control is neither on PATH.*'compute' driver capability"):
        MpsDaemon()
    (tmp_path / "nvidia-cuda-mps-control").symlink_to(FAKES / "nvidia-cuda-mps-control")
    with pytest.raises(MpsError, match=r"nvidia-cuda-mps-server is missing beside .*: install both"):
        MpsDaemon()


def test_programs_off_the_path_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(mps_daemon, "PLACES", ("/nowhere", str(FAKES)))
    assert mps_daemon.find_program(mps_daemon.CONTROL, {"PATH": str(tmp_path)}) == str(FAKES / mps_daemon.CONTROL)


def test_the_environment_of_another_daemon_is_not_inherited(machine):
    machine(CUDA_MPS_PIPE_DIRECTORY="/somebody", CUDA_MPS_ACTIVE_THREAD_PERCENTAGE="10", CUDA_MPS_LOG_DIRECTORY="/else")
    daemon = MpsDaemon("GPU-aaaa")
    assert daemon.env["CUDA_MPS_PIPE_DIRECTORY"] == f"{daemon.root}/p"
    assert "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE" not in daemon.env
    assert machine.asked()[0] == "-d GPU-aaaa"
    assert daemon.client_env(30.31) == {
        "CUDA_MPS_PIPE_DIRECTORY": f"{daemon.root}/p",
        "CUDA_MPS_LOG_DIRECTORY": f"{daemon.root}/l",
        "CUDA_VISIBLE_DEVICES": "GPU-aaaa",
        "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "30.31",
    }
    daemon.quit()


def test_a_setting_that_would_change_every_worker_is_refused(machine):
    machine(CUDA_MPS_PINNED_DEVICE_MEM_LIMIT="0=1G")
    with pytest.raises(MpsError, match=r"CUDA_MPS_PINNED_DEVICE_MEM_LIMIT is set in the environment .* unset it"):
        MpsDaemon()


def test_a_foreign_daemon_is_seen(tmp_path):
    assert not mps_daemon.foreign_daemon(tmp_path)
    (tmp_path / "control").touch()
    assert mps_daemon.foreign_daemon(tmp_path)  # no number to read: assume it lives
    (tmp_path / "nvidia-cuda-mps-control.pid").write_text(f"{os.getpid()}\n")
    assert mps_daemon.foreign_daemon(tmp_path)
    (tmp_path / "nvidia-cuda-mps-control.pid").write_text("999999999\n")
    assert not mps_daemon.foreign_daemon(tmp_path)


# Shares


def test_shares_are_whole_steps_that_grant_as_many_sms():
    shares = H200.shares()
    assert (shares[0], shares[1], shares[-1], len(shares)) == (1.52, 3.04, 100, 66)
    assert [int(share * 132 / 100) // 2 * 2 for share in shares] == [H200.sms_for(share) for share in shares]
    assert Mps(sms=80, rounds_up=True).shares()[:2] == (2.5, 5)
    assert Mps(sms=132, step_sms=8).shares()[-2:] == (96.97, 100)  # the whole is a share even if no whole step


@pytest.mark.parametrize(
    ("share", "words"),
    [(1.1, r"gpu_pct = 1\.1: .* nearest 1\.52"), (50.6, "nearest 50 or 51.52"), (0.5, "from 1 to 100"), (101, "from 1 to 100")],
)
def test_a_share_between_two_steps_names_its_neighbours(share, words):
    with pytest.raises(ValueError, match=words):
        H200.sms_for(share)


@pytest.mark.parametrize(
    "wrong",
    [{"device": -1}, {"precision": "int8"}, {"step_sms": 0}, {"sms": 0}, {"tolerance_sms": -1}, {"graphs": 1}],
)
def test_a_wrong_field_is_named(wrong):
    (field,) = wrong
    with pytest.raises(ValueError, match=f"{field} = "):
        Mps(**wrong)


def test_constructing_touches_nothing_and_it_is_a_device(machine):
    machine(FAKE_DRIVER="absent")
    assert isinstance(Mps(device=3), Device)
    assert machine.roots == []


class Holder:
    def __init__(self, pid, sms):
        self.pid, self.sms = pid, sms


def test_leases_never_sum_to_more_than_the_gpu():
    leases, big, small, tiny = SmLeases(132), Holder(1, 100), Holder(2, 32), Holder(3, 2)
    leases.take(big)
    leases.take(small)
    with pytest.raises(RuntimeError, match="needs 2 SMs, 0 are free"):
        leases.take(tiny)
    with pytest.raises(RuntimeError, match="holds SMs already"):
        leases.take(big)
    leases.give(small)
    leases.give(small)
    leases.take(tiny)
    free = SmLeases(None)
    free.take(big)
    free.take(Holder(4, 132))


# Workers


def test_a_worker_gets_its_cap_before_its_cuda_starts(machine):
    with Mps(precision="bf16", graphs=False) as device:
        assert (device.describe(), device.marks()) == ("NVIDIA H200, 132 SMs", ())
        with device.start("any", 50, batches=(2,), memory_mib=100) as one, device.start("any", 25.76) as two:
            ready = one.wait_ready(30)
            env = ready["facts"]["env"]
            assert (env["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"], env["DSTACK_LAB_PRECISION"]) == ("50", "bf16")
            assert (env["DSTACK_LAB_GRAPHS"], env["DSTACK_LAB_CHANNELS_LAST"]) == ("0", "1")
            assert "CUDA_VISIBLE_DEVICES" not in env
            assert ready["facts"]["granted_sms"] == one.sms == 66
            assert two.wait_ready(30)["facts"]["granted_sms"] == two.sms == 34
            reply = one.ask({"op": "run", "inputs": [7]}, 5)
            assert (reply["outputs"], reply["gpu_ms"]) == ([[7, 0.0]], 0.5)
            assert len(one.ask({"op": "time", "batch": 1, "repeats": 3}, 5)["gpu_ms"]) == 3
            assert sum(line.startswith("-d") for line in machine.asked()) == 1  # one daemon for both
        assert not any(line.startswith("terminate_client") for line in machine.asked())  # they ended in order


def test_a_client_is_let_go_before_it_is_killed(machine):
    with Mps() as device, device.start("any", 100) as worker:
        worker.wait_ready(30)
        pid = worker.pid
        worker.kill()
        assert f"terminate_client {worker.daemon.server} {pid}" in machine.asked()
        assert not mps_keeper.lives(pid)


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"FAKE_OUTSIDE": "1"}, "outside MPS, without a cap"),
        ({"FAKE_EXTRA_SMS": "10"}, r"share 50 % is 66 SMs, but 76 were granted: .*tolerance_sms=10"),
        ({"FAKE_EXTRA_SMS": "-66"}, "granted 0 SMs"),
        ({"FAKE_CUDA_ERROR": "CUDA error: MPS server is not ready to accept new clients"}, r"\(807\).*Close them all"),
    ],
)
def test_a_worker_without_its_cap_is_refused(machine, env, words):
    machine(**env)
    with Mps() as device, device.start("any", 50) as worker, pytest.raises(WorkerFailed, match=words):
        worker.wait_ready(30)


def test_a_worker_whom_the_daemon_lists_is_under_mps_whatever_the_driver_says(machine):
    machine(FAKE_OUTSIDE="1", FAKE_MPS="lists")
    with Mps() as device, device.start("any", 50) as worker:
        assert worker.wait_ready(30)["facts"]["granted_sms"] == 66
        assert worker.daemon.serves(worker.pid)
        assert not worker.daemon.serves(1)


def test_a_tolerated_difference_is_let_pass(machine):
    machine(FAKE_EXTRA_SMS="-8")
    with Mps() as device, device.start("any", 50) as worker:
        assert worker.wait_ready(30)["facts"]["granted_sms"] == 58
        assert worker.granted_sms == 58  # what rows of profiles and traces say
    with Mps(tolerance_sms=2) as device, device.start("any", 50) as worker, pytest.raises(WorkerFailed, match="58 were granted"):
        worker.wait_ready(30)


@pytest.mark.parametrize(("mood", "most"), [("ok", 48), ("new", 60)])
def test_the_gpu_takes_only_so_many_workers(machine, mood, most):
    machine(FAKE_MPS=mood)
    assert Mps()._daemon().most_clients == most
    for device, room in ((Mps(), most - 1), (Mps(share_parameters=False), most)):  # one client holds the parameters
        assert device.most_workers() == room
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("dstack_lab.devices.mps.clients", lambda daemon, room=room: [None] * room)
            with pytest.raises(MpsError, match=f"{room} workers run under MPS already"):
                device.start("any", 50)


def test_a_dead_daemon_is_replaced_only_without_workers(machine):
    device = Mps()
    with device.start("any", 50) as worker:
        worker.wait_ready(30)
        os.kill(worker.daemon.pid, signal.SIGKILL)
        while worker.daemon.alive:
            time.sleep(0.01)
        with pytest.raises(MpsError, match="daemon died under its workers: close them all"):
            device.start("any", 50)
    with device.start("any", 50) as fresh:
        assert fresh.wait_ready(30)["facts"]["mps"]
        assert fresh.daemon is not worker.daemon
        assert not mps_keeper.lives(worker.daemon.server)
    device.stop()
    device.stop()


def test_stop_ends_workers_too(machine):
    device = Mps()
    worker = device.start("any", 50)
    device.stop()
    assert not worker.alive


# Machines that cannot


@pytest.mark.parametrize(
    ("env", "error", "words"),
    [
        ({"FAKE_DRIVER": "absent"}, nvml.NoDriver, "no NVIDIA driver .*--gpus all"),
        ({"FAKE_DRIVER": "unloaded"}, nvml.NoDriver, "driver is not loaded"),
        ({"FAKE_DRIVER": "forbidden"}, nvml.NoDriver, "no permission .* run as root"),
        ({"FAKE_DRIVER": "odd"}, nvml.NoDriver, "does not answer"),
        ({"FAKE_GPUS": []}, nvml.NoDriver, "shows no GPU: start the container"),
        ({"FAKE_GPUS": [{"forbidden": 1}]}, nvml.NoDriver, "no permission for GPU 0"),
        ({"CUDA_VISIBLE_DEVICES": ""}, nvml.NoDriver, "shows no GPU: unset CUDA_VISIBLE_DEVICES"),
        ({"FAKE_GPUS": [{"MigMode": [1, 1]}]}, MpsError, r"MIG is on for GPU 0.* As root: nvidia-smi -i 0 -mig 0"),
        ({"FAKE_GPUS": [{"ComputeMode": 2}]}, MpsError, r"compute mode of GPU 0 is prohibited.*-c DEFAULT"),
        ({"FAKE_GPUS": [{"ComputeMode": 3, "pids": [77]}]}, MpsError, "exclusive process and process 77 has it"),
        ({"FAKE_GPUS": [{"NumGpuCores": None}]}, MpsError, r"does not tell this GPU's number of SMs: .*Mps\(sms=132\)"),
        ({"FAKE_MPS": "status244"}, MpsError, "libcuda"),
    ],
)
def test_what_this_machine_lacks_is_said_with_the_cure(machine, env, error, words):
    machine(**env)
    with pytest.raises(error, match=words):
        Mps().start("any", 100)


def test_exclusive_process_alone_is_no_obstacle(machine):
    machine(FAKE_GPUS=[{"ComputeMode": 3}])
    with Mps() as device:
        assert device._daemon().alive


def test_one_of_two_gpus_is_served(machine):
    machine(FAKE_GPUS=[{}, {"UUID": "GPU-bbbb", "NumGpuCores": 4608, "Name": "small"}])
    with pytest.raises(ValueError, match=r"device = 2: must be from 0 to 1: this process sees 2 GPU\(s\)"):
        Mps(2).shares()
    assert Mps(1).describe() == "small, 36 SMs"
    with Mps(1) as device:
        assert device._daemon().client_env(50)["CUDA_VISIBLE_DEVICES"] == "GPU-bbbb"
    assert machine.asked()[0] == "-d GPU-bbbb"


def test_visible_devices_choose_and_order():
    uuids = ["GPU-aa", "GPU-ab", "GPU-b"]
    assert nvml.visible(uuids, None) == [0, 1, 2]
    assert nvml.visible(uuids, "2, 0") == [2, 0]
    assert nvml.visible(uuids, "GPU-b,GPU-aa") == [2, 0]
    assert nvml.visible(uuids, "1,7,0") == [1]  # as CUDA does: what follows a wrong one is gone
    assert nvml.visible(uuids, "GPU-a") == []  # ambiguous
    assert nvml.visible(uuids, "") == []


def test_reservations_are_told(machine, monkeypatch, tmp_path):
    machine(FAKE_GPUS=[{"pids": [5, 6], "CurrentClocksEventReasons": 0x24, "ClockInfo": 1200}])
    (tmp_path / "control").touch()
    monkeypatch.setattr("dstack_lab.devices.mps.FOREIGN", tmp_path)
    kinds = [mark.split(":")[0] for mark in Mps(oversubscribe=True).marks()]
    assert kinds == ["other processes", "throttled", "foreign MPS daemon", "oversubscribed shares"]
    assert "power cap, heat holds the clock at 1200 MHz" in Mps().marks()[1]


def started(share=50, number=0):
    with Mps(number) as device, device.start("any", share) as worker:
        worker.wait_ready(30)


def opened_by_a_torch_without_cuda():
    from fake_torch import FakeTorch

    from dstack_lab.cuda_backend import open_gpu

    open_gpu(FakeTorch(built_for=None))


#: What the machine or the user got wrong -> its environment, what is tried, what is wrong in words, and the cure.
BAD_INPUT = {
    "no GPU": ({"FAKE_GPUS": []}, started, "shows no GPU", "start the container with"),
    "no driver": ({"FAKE_DRIVER": "absent"}, started, "no NVIDIA driver", "--gpus all"),
    "no MPS programs": ({"PATH": "/nowhere"}, started, "nvidia-cuda-mps-control is neither on PATH", "install the package"),
    "no permission": ({"FAKE_DRIVER": "forbidden"}, started, "no permission", "run as root"),
    "MIG on": ({"FAKE_GPUS": [{"MigMode": [1, 1]}]}, started, "MIG is on", "nvidia-smi -i 0 -mig 0"),
    "exclusive": ({"FAKE_GPUS": [{"ComputeMode": 3, "pids": [7]}]}, started, "exclusive process", "nvidia-smi -i 0 -c DEFAULT"),
    "0 SMs granted": ({"FAKE_EXTRA_SMS": "-66"}, started, "granted 0 SMs", "raise its share"),
    "below the step": ({}, lambda: started(1.2), "whole steps of 2 SMs", "nearest 1.52"),
    "two devices": ({"FAKE_GPUS": [{}, {"UUID": "GPU-b"}]}, lambda: started(number=2), "2 GPU(s)", "must be from 0 to 1"),
    "model larger than memory": ({"FAKE_FULL": "full"}, started, "memory is full", "a smaller batch, fewer workers"),
    "torch without CUDA": ({}, opened_by_a_torch_without_cuda, "built without CUDA", "install a CUDA build"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_clear_sentence_with_its_cure(machine, monkeypatch, tmp_path, case):
    env, tried, wrong, cure = BAD_INPUT[case]
    (tmp_path / "full").touch()
    machine(**{name: str(tmp_path / "full") if value == "full" else value for name, value in env.items()})
    monkeypatch.setattr(mps_daemon, "PLACES", ())
    with pytest.raises((RuntimeError, ValueError)) as caught:
        tried()
    said = str(caught.value)
    assert wrong in said
    assert cure in said
    assert "\n" not in said
    assert "Traceback" not in said


# Errors of CUDA


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("CUDA error: MPS client failed to connect to the MPS control daemon or the MPS server", 805),
        ("Search for `cudaErrorMpsRpcFailure' in", 806),
        ("CUDA_ERROR_MPS_SERVER_NOT_READY", 807),
        ("CUDA error: the hardware resources required to create MPS client have been exhausted", 808),
        ("the hardware resources required to support device connections have been exhausted", 809),
        ("CUDA error 810", 810),
    ],
)
def test_errors_of_mps_have_cures(text, number):
    assert f"({number})" in cure_of(text)
    assert with_cure(text).endswith(f"It said: {text}")


def test_other_errors_are_left_alone():
    assert cure_of("something else 8070") is None
    assert with_cure("as it was") == "as it was"
    assert "busy" in with_cure("CUDA error: CUDA-capable device(s) is/are busy or unavailable")


# The worker's side, on a pretended GPU

NETWORK = """
import torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 5, 3)
    def forward(self, x):
        assert x.is_contiguous(memory_format=torch.channels_last) and x.dtype == self.conv.weight.dtype
        return {"logits": self.conv(x).mean((2, 3))}
def net(): return Net(), torch.randn(8, 3, 8, 8)
def tokens(): return torch.nn.Embedding(9, 4), torch.arange(8).reshape(8, 1)
"""


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """Give a function that makes a backend on a pretended GPU."""
    (tmp_path / "net.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(str(FAKES))
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    import torch  # the real one, whole, before it is hidden
    from fake_torch import FakeTorch

    from dstack_lab.cuda_backend import CudaBackend, CudaOptions

    def make(network="net", cuda=None, **machine):
        fake = FakeTorch(**machine)
        monkeypatch.setitem(sys.modules, "torch", fake)
        options = parse([f"--model={tmp_path}/net.py:{network}", "--device=cuda", "--pool=8"])
        return CudaBackend(options, CudaOptions(**cuda or {})), fake

    yield make
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)


def answers(backend, inputs):
    """What the network says, computed plainly."""
    import torch

    rows = torch.tensor(inputs) % 8
    with torch.inference_mode():
        out = backend.module(*backend.views([backend.pool[0].index_select(0, rows)]))
        out = (out["logits"] if isinstance(out, dict) else out).reshape(len(inputs), -1).float()
    return out.argmax(1).tolist(), out.mean(1).tolist()


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_eager_answers_are_those_of_the_network(gpu, precision):
    backend, fake = gpu(cuda={"precision": precision, "graphs": False})
    backend.load()
    for inputs in ([3], [1, 2, 9], [5], range(8)):
        classes, scores = answers(backend, list(inputs))
        got = backend.run(inputs)
        assert [c for c, _ in got] == classes
        assert [s for _, s in got] == pytest.approx(scores, rel=1e-2, abs=1e-3)
    assert (str(backend.module.conv.weight.dtype), backend.gpu_ms) == (f"torch.{PRECISIONS[precision]}", 1.5)
    assert fake.diary.count("pinned") == 3 * 3  # inputs, classes, scores of three batches
    assert not any(line.startswith(("capture", "replay")) for line in fake.diary)


def test_each_batch_is_captured_once_on_the_stream_it_warmed_up_on(gpu):
    backend, fake = gpu()
    backend.load()
    assert fake.diary == ["threads 1", "synchronize device"]
    fake.diary.clear()
    backend.prepare(2)
    buffers = ["pinned"] * 3
    launch = ["event", "replay", "event", "synchronize stream"]
    assert fake.diary == [*buffers, "synchronize stream", "capture pool thread_local"]
    for _ in range(2):
        fake.diary.clear()
        backend.run([4, 5])
        assert (fake.diary, backend.path) == (launch, "graph")  # no allocation, no wait for the whole device
    backend.prepare(2)
    assert fake.diary == launch  # once is enough


def test_a_batch_without_a_graph_is_padded_or_marked_and_never_captured_on_the_way(gpu):
    backend, fake = gpu()
    backend.load()
    for batch in (4, 8):
        backend.prepare(batch)
    fake.diary.clear()
    assert len(backend.run([1, 2, 9])) == 3
    filled = backend.pool[0][[1, 2, 1, 1]]  # 9 is 1 in a pool of 8; the last one fills up
    assert (backend.slots[4].host[0] == filled).all()
    assert (backend.slots[4].inputs[0] == filled).all()
    assert (backend.path, fake.diary.count("replay")) == ("padded", 1)
    assert len(backend.run(range(9))) == 9  # larger than all
    assert (backend.path, fake.diary.count("replay")) == ("eager", 1)
    assert not any(line.startswith("capture") for line in fake.diary)


def test_token_numbers_stay_whole_numbers(gpu):
    backend, _ = gpu("tokens", {"graphs": False})
    backend.load()
    assert not backend.pool[0].is_floating_point()
    assert [c for c, _ in backend.run([2, 7])] == answers(backend, [2, 7])[0]


def test_facts_tell_what_was_granted(gpu, monkeypatch):
    backend, _ = gpu(sms=34)
    monkeypatch.setattr("dstack_lab.cuda_backend.under_mps", lambda: True)
    told = backend.load()
    assert (told["granted_sms"], told["all_sms"], told["mps"], told["driver"]) == (34, 132, True, "580.159")
    assert (told["device"], told["clock_mhz"], told["power_w"]) == ("NVIDIA H200", 1980, 350)
    assert (told["precision"], told["channels_last"], told["graphs"]) == ("fp16", True, True)
    json.dumps(told)


def test_without_nvml_the_facts_are_fewer(gpu, monkeypatch):
    monkeypatch.setenv("FAKE_DRIVER", "absent")
    backend, _ = gpu()
    told = backend.load()
    assert told["granted_sms"] == 66
    assert "clock_mhz" not in told


def test_the_memory_cap_counts_from_what_is_reserved(gpu):
    backend, fake = gpu()
    backend.load()
    backend.cap_memory(200)
    backend.cap_memory(5000)
    assert fake.diary[-2:] == ["fraction 0.3", "fraction 1"]


@pytest.mark.parametrize(
    ("machine", "error", "words"),
    [
        ({"built_for": None}, None, r"torch 2\.11\.0\+fake was built without CUDA: install a CUDA build"),
        ({"gpus": 0}, None, "CUDA shows no GPU: unset CUDA_VISIBLE_DEVICES"),
        ({}, "MPS client failed to connect to the MPS control daemon", "CUDA does not start: MPS client failed"),
    ],
)
def test_a_gpu_that_does_not_open_is_explained(gpu, machine, error, words):
    backend, fake = gpu(**machine)
    fake.cuda.error = error
    with pytest.raises(RuntimeError, match=words):
        backend.load()


def test_a_network_that_cannot_be_captured_says_how_to_run_it(gpu):
    backend, fake = gpu()
    backend.load()
    fake.cuda.capture_error = "operation not permitted when stream is capturing"
    with pytest.raises(RuntimeError, match=r"cannot be captured in a CUDA graph: pass graphs=False .*not permitted"):
        backend.prepare(1)
    fake.cuda.capture_error = "CUDA out of memory"
    with pytest.raises(RuntimeError, match=r"^CUDA out of memory"):
        backend.prepare(1)
    fake.cuda.capture_error = None
    backend.prepare(1)
    assert len(backend.run([0])) == 1  # nothing half-made is kept


def test_options_come_from_the_environment():
    from dstack_lab.cuda_backend import CudaOptions

    env = {"DSTACK_LAB_PRECISION": "bf16", "DSTACK_LAB_CHANNELS_LAST": "0", "DSTACK_LAB_GRAPHS": "1"}
    assert CudaOptions.from_env(env) == CudaOptions("bf16", False, True)
    assert CudaOptions.from_env({}) == CudaOptions()
    with pytest.raises(ValueError, match="DSTACK_LAB_GRAPHS = 'yes': must be 0 or 1"):
        CudaOptions.from_env({"DSTACK_LAB_GRAPHS": "yes"})
    with pytest.raises(ValueError, match="precision = 'int8'"):
        CudaOptions.from_env({"DSTACK_LAB_PRECISION": "int8"})


def test_without_libcuda_nothing_is_under_mps():
    from dstack_lab.cuda_backend import under_mps

    assert not under_mps("libcuda_that_is_not_there.so")


@pytest.mark.slow
def test_a_real_worker_without_cuda_says_so(tmp_path):
    import torch

    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA")
    with WorkerProcess("alexnet", 100, backend="cuda") as worker:
        with pytest.raises(WorkerFailed, match="was built without CUDA: install a CUDA build"):
            worker.wait_ready(60)


# Through the public verbs


@pytest.mark.slow
def test_measure_and_run_need_not_know_the_device(machine, tmp_path):
    import dstack_lab as lab

    with Mps() as device:
        profile = lab.measure(["alexnet"], device=device, batches=[1, 2], shares=[50, 100], seconds_per_point=0.1)
        assert (profile.provenance.device, profile.provenance.mechanism) == ("NVIDIA H200, 132 SMs", "MPS")
        plan = lab.optimize([lab.Service("alexnet", slo_ms=500, arrivals=lab.Poisson(rate_rps=50))], profile)
        trace = lab.run(plan, lab.Temporal(), device=device, duration_ms=1000, seed=1)
    all_of_it = lab.summary(trace).iloc[-1]
    assert trace.samples["time_ms"].is_monotonic_increasing
    assert trace.samples["dram_util_pct"].isna().all()  # what is not told is not 0
    assert all_of_it["sm_utilization"] == pytest.approx(0.6)
    seen = trace.samples[trace.samples["time_ms"].between(0, 1000)]
    span_ms = seen["time_ms"].iloc[-1] - seen["time_ms"].iloc[0]
    inside = trace.requests["finish_ms"].between(*seen["time_ms"].iloc[[0, -1]]).sum()
    assert all_of_it["energy_j"] == pytest.approx(0.350 * span_ms / inside, rel=0.1)  # 350 W, all the time
    again = lab.load_trace(trace.save(tmp_path / "run"))
    pd.testing.assert_frame_equal(again.samples, trace.samples)
    assert set(trace.launches["effective_sms"]) == {132}
    assert trace.provenance.mechanism == "MPS"
    assert len(trace.requests) > 5
    assert trace.requests["finish_ms"].notna().all()


@pytest.mark.slow
def test_copies_of_a_share_are_processes_of_their_own_and_serve_at_once(machine):
    from test_copies import Beside, most_at_once

    import dstack_lab as lab

    rows = [{"model": "alexnet", "batch": b, "gpu_pct": g, "service_ms": 3.0} for b in (1, 2, 4) for g in (50, 100)]
    profile = lab.Profile(pd.DataFrame(rows), lab.Provenance("measured", "fake", "MPS"))
    bursts = lab.Replay([at for at in (50.0, 100.0, 300.0, 600.0) for _ in range(10)])
    plan = lab.optimize([lab.Service("alexnet", 500, bursts)], profile)
    pids = []
    with Mps() as device:

        class Watched(Meanwhile, Beside):
            at_ms = 250.0

        policy = Watched(50)

        def kill_one():
            pids.extend(worker.pid for worker in clients(device._daemon()))
            os.kill(pids[0], signal.SIGKILL)

        policy.deed = kill_one
        trace = lab.run(plan, policy, device, 700, seed=1, drain_ms=60_000)
        assert len(device._daemon().unshared) == 0
    assert len(set(pids)) == 2
    kinds = served_once(trace)
    assert set(kinds) <= {"worker died", "retried", "worker ready"}
    assert kinds.count("worker died") == 1
    assert most_at_once(trace.launches) == 2
    assert set(trace.launches["effective_sms"]) == {66}


class Meanwhile:
    """Mixed into a policy: calls `deed` once, when the run is `at_ms` old."""

    at_ms, deed = 150.0, None

    def decide(self, state):
        if self.deed is not None and state.now_ms > self.at_ms:
            self.deed, deed = None, self.deed
            deed()
        return super().decide(state)


def run_with(deed, device, **options):
    """Two services under MPS while `deed` is done to them; both finish whatever it is."""
    import dstack_lab as lab

    models = ("alexnet", "resnet18")
    rows = [{"model": m, "batch": b, "gpu_pct": g, "service_ms": 3.0} for m in models for b in (1, 2, 4) for g in (50, 100)]
    profile = lab.Profile(pd.DataFrame(rows), lab.Provenance("measured", "fake", "MPS"))
    plan = lab.optimize([lab.Service(m, 500, lab.Deterministic(50)) for m in models], profile)
    policy = type("Watched", (Meanwhile, lab.Temporal), {})()
    policy.deed = deed
    return lab.run(plan, policy, device, 600, seed=1, drain_ms=60_000, **options)


def served_once(trace):
    """Every request has its own answer: the fake network says the number of its input."""
    assert (trace.requests["outcome"] == "served").all()
    for _, mine in trace.requests.groupby("service", observed=True):
        assert mine["answer"].tolist() == list(range(len(mine)))
    return trace.events["kind"].tolist()


@pytest.mark.slow
def test_a_daemon_that_dies_in_a_run_is_started_anew_with_all_workers(machine):
    with Mps() as device:
        pids = []

        def kill():
            pids.append(device._daemon().pid)
            os.kill(pids[0], signal.SIGKILL)

        trace = run_with(kill, device)
        kinds = served_once(trace)
        assert kinds.count("all workers lost") == 1
        assert trace.events["detail"].iloc[0] == "the MPS daemon died under its workers"
        assert kinds.count("worker ready") == 2
        assert device._daemon().pid != pids[0]
        assert sum(line.startswith("-d") for line in machine.asked()) == 2
        assert set(trace.launches["effective_sms"]) == {132}  # nobody computed outside MPS meanwhile


@pytest.mark.slow
def test_a_server_in_fault_is_started_anew_with_all_workers(machine, tmp_path):
    fault = tmp_path / "fault"
    machine(FAKE_FAULT=str(fault))
    with Mps() as device:
        trace = run_with(fault.touch, device)
    kinds = served_once(trace)
    assert kinds.count("all workers lost") == 1
    assert "(807)" in trace.events.loc[trace.events["kind"] == "all workers lost", "detail"].iloc[0]
    assert not fault.exists()


@pytest.mark.slow
def test_a_daemon_that_does_not_start_again_ends_the_run_with_its_trace(machine):
    import dstack_lab as lab

    with Mps() as device:

        def kill():
            machine(FAKE_MPS="status244")
            os.kill(device._daemon().pid, signal.SIGKILL)

        with pytest.raises(lab.RunError, match=r"cannot load libcuda\.so\.1 .*3 times in a row") as caught:
            run_with(kill, device)
        outcomes = caught.value.trace.requests["outcome"].value_counts()
        assert outcomes["served"] > 0
        assert outcomes["unserved"] > 0
        assert outcomes["dropped"] == 0


@pytest.mark.slow
def test_a_worker_that_runs_out_of_memory_is_replaced_and_its_batch_tried_again(machine, tmp_path):
    full = tmp_path / "full"
    machine(FAKE_FULL=str(full))
    with Mps() as device:
        trace = run_with(full.touch, device)
    assert served_once(trace) == ["out of memory", "retried", "worker ready"]
    assert "a smaller batch, fewer workers, or a higher memory_mib" in trace.events["detail"].iloc[0]
    assert sum(line.startswith("-d") for line in machine.asked()) == 1  # its own fault: the others go on


@pytest.mark.slow
def test_ctrl_c_in_a_run_leaves_neither_worker_nor_daemon(machine):
    code = """import sys; sys.path[:0] = ['tests', 'tests/fakes']
from test_mps import Mps, run_with
run_with(lambda: print("in the run", flush=True), Mps(), hung_ms=60_000)"""
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=FAKES.parents[1],
        start_new_session=True,
    ) as owner:
        assert owner.stdout.readline() == "in the run\n"
        workers = mps_keeper.children(owner.pid)
        assert len(workers) >= 3  # two workers and the keeper
        os.killpg(owner.pid, signal.SIGINT)  # as a terminal does
        said = owner.communicate(timeout=60)[1]
    assert "KeyboardInterrupt" in said
    assert not any(mps_keeper.wait_gone(pid, 0, 20) for pid in workers)
    asked = machine.asked()
    assert asked[-1] == "quit -t 10"
    assert sum(line.startswith("terminate_client") for line in asked) == 2  # nobody was killed under the server


@pytest.mark.slow
def test_the_parent_opens_no_gpu_while_it_measures_and_runs(machine):
    """Neither torch nor a CUDA library is in the process that measures and runs."""
    code = """import sys; sys.path.insert(0, 'tests')
import pandas, dstack_lab as lab; from dstack_lab.devices.mps import Mps
with Mps() as device:
    profile = lab.measure(['alexnet'], device=device, batches=[1, 2], shares=[50, 100], seconds_per_point=0.05)
    plan = lab.optimize([lab.Service('alexnet', slo_ms=500, arrivals=lab.Poisson(rate_rps=50))], profile)
    lab.run(plan, lab.DStack(), device=device, duration_ms=300, seed=1)
maps = open('/proc/self/maps').read()
print('torch' in sys.modules, 'cuda' in sys.modules, 'libcuda' in maps, 'libcudart' in maps)"""
    env = {**os.environ, "PYTHONPATH": str(FAKES)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=FAKES.parents[1], env=env, check=False
    )
    assert done.stdout.splitlines()[-1:] == ["False False False False"], done.stderr


@pytest.mark.slow
def test_a_killed_owner_leaves_neither_worker_nor_daemon(machine):
    code = """import os; from dstack_lab.devices.mps import Mps
w = Mps().start("any", 50); w.wait_ready(30); print(w.daemon.root, w.pid, flush=True); os.kill(os.getpid(), 9)"""
    env = {**os.environ, "PYTHONPATH": str(FAKES)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=FAKES.parents[1], env=env, check=False
    )
    root, pid = done.stdout.split()
    assert nothing_left([root])
    assert not mps_keeper.wait_gone(int(pid), 0)


def test_the_parent_needs_neither_torch_nor_cuda():
    code = "import sys, dstack_lab.devices.mps; from dstack_lab.devices import probe; probe(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=FAKES.parents[1], check=True)
    assert done.stdout == "False\n"
