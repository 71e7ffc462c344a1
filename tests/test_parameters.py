"""One copy of a network's parameters for all of its workers: real shared memory, real processes, a pretended GPU."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_mps import FAKES, NETWORK, gpu, machine, nothing_left, run_with, served_once  # noqa: F401

from dstack_lab import zoo
from dstack_lab.devices import parameter_host, parameter_map
from dstack_lab.devices.base import WorkerDied
from dstack_lab.devices.mps import Mps
from dstack_lab.devices.parameter_host import Holder, ParameterHost
from dstack_lab.devices.parameter_map import NotShared, exported, fill, gone, mapped, pack, tensors

FLOATS = {"weights": None, "seed": 0, "dtype": "float32", "channels_last": True}


class Odd(torch.nn.Module):
    """Tied and empty parameters, a view of a larger tensor, a buffer that no state_dict has, one number, whole numbers."""

    def __init__(self):
        super().__init__()
        self.one = torch.nn.Linear(3, 4)
        self.two = torch.nn.Linear(3, 4)
        self.two.weight = self.one.weight
        self.again = self.one
        self.part = torch.nn.Parameter(torch.arange(20.0)[3:7])
        self.none = torch.nn.Parameter(torch.empty(0))
        self.norm = torch.nn.BatchNorm2d(2)
        self.conv = torch.nn.Conv2d(2, 4, 3).to(memory_format=torch.channels_last)
        self.register_buffer("hidden", torch.tensor([1, -2, 3], dtype=torch.int16), persistent=False)
        self.register_buffer("nothing", None)


@contextlib.contextmanager
def hosting():
    """A process that holds parameters in the memory of this machine."""
    folder = tempfile.mkdtemp(prefix="mps", dir="/tmp")
    held = ParameterHost(folder, {}, "cpu")
    yield held
    held.close()
    held.close()
    assert not held.alive
    Path(held.path).unlink(missing_ok=True)
    Path(folder).rmdir()


@pytest.fixture(scope="module")
def host():
    """One for all tests that leave it alive: each takes seconds to import torch."""
    with hosting() as held:
        yield held


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "net.py"
    path.write_text(NETWORK)
    return f"{path}:net"


def test_a_block_holds_every_tensor_in_its_form_and_tied_ones_once():
    torch.manual_seed(1)
    module = Odd()
    block = pack(module, "cpu")
    places = block.places
    assert set(places) == {name for name, _ in tensors(module)} >= {"hidden", "two.weight", "norm.num_batches_tracked", "none"}
    assert places["one.weight"] == places["two.weight"] == places["again.weight"]
    assert places["conv.weight"][2] == list(module.conv.weight.stride()) != [18, 9, 3, 1]
    assert all(at % parameter_map.ALIGNMENT == 0 for *_, at in places.values())
    torch.manual_seed(2)
    other = Odd()
    fill(other, exported(block))
    for (name, mine), (_, theirs) in zip(tensors(module), tensors(other), strict=True):
        assert torch.equal(mine, theirs), name
        assert (mine.dtype, theirs.requires_grad) == (theirs.dtype, False)
    assert other.one.weight.data_ptr() == other.two.weight.data_ptr() == other.again.weight.data_ptr()


@given(st.lists(st.lists(st.integers(1, 5), max_size=4), min_size=1, max_size=8), st.integers(0, 2**31))
def test_no_two_tensors_of_a_block_overlap(shapes, seed):
    source = torch.Generator().manual_seed(seed)
    module = torch.nn.ParameterList([torch.rand(shape, generator=source) for shape in shapes])
    before = [p.clone() for p in module]
    empty = torch.nn.ParameterList([torch.empty(shape, device="meta") for shape in shapes])
    block = pack(module, "cpu")  # outlives whoever maps it
    fill(empty, exported(block))
    assert all(torch.equal(a, b) for a, b in zip(before, empty, strict=True))


@pytest.mark.parametrize("name", ["squeezenet1_1", "mobilenet_v2", "bert_base"])
@pytest.mark.slow
def test_a_hollow_network_is_the_whole_one_once_it_is_filled(name):
    whole, hollow = zoo.load(name, seed=3), zoo.load(name, seed=3, hollow=True)
    assert all(tensor.is_meta for _, tensor in tensors(hollow.module))
    block = pack(whole.module, "cpu")
    fill(hollow.module, exported(block))
    inputs = whole.example(2)
    assert all(torch.equal(a, b) for a, b in zip(inputs, hollow.example(2), strict=True))
    with torch.inference_mode():
        mine, theirs = whole.module(*inputs), hollow.module(*inputs)
    assert torch.equal(*(out[0] if isinstance(out, tuple) else out for out in (mine, theirs)))


@pytest.mark.slow
def test_two_workers_map_the_same_memory(network):
    """What one process writes is what another reads: one copy, not two. It is gone with its holder, and known to be."""
    with hosting() as host:
        share_one_memory(network, host)


def share_one_memory(network, host):
    asked = {"model": network, **FLOATS}
    modules = [zoo.load(network, seed=9).module for _ in range(2)]
    lines = [mapped(module, host.path, asked) for module in modules]
    one, two = (module.conv.weight for module in modules)
    assert one.data_ptr() != two.data_ptr()  # mapped twice here, for there are two storages
    assert torch.equal(one, zoo.load(network, seed=0).module.conv.weight)  # the host's seed, not that of the module
    one[0, 0, 0, 0] = 123.0
    assert two[0, 0, 0, 0] == 123.0
    code = f"""import sys; from dstack_lab import zoo; from dstack_lab.devices.parameter_map import mapped
m = zoo.load(sys.argv[1]).module; line = mapped(m, sys.argv[2], {asked!r}); w = m.conv.weight
print(float(w[0, 0, 0, 0])); w[0, 0, 0, 1] = -7"""
    there = subprocess.run([sys.executable, "-c", code, network, host.path], capture_output=True, text=True, check=False)
    assert there.stdout == "123.0\n", there.stderr
    assert two[0, 0, 0, 1] == -7.0
    assert [gone(line) for line in lines] == [False, False]
    os.kill(host.pid, signal.SIGKILL)
    lines[0].settimeout(10)
    assert lines[0].recv(1) == b""
    assert gone(lines[1])
    with pytest.raises(NotShared, match="the process that holds the parameters does not answer"):
        mapped(modules[0], host.path, asked)
    for line in lines:
        line.close()


@pytest.mark.slow
def test_a_worker_that_is_killed_takes_nothing_with_it(host, network):
    asked = {"model": network, **FLOATS}
    code = f"""import os, sys; from dstack_lab import zoo; from dstack_lab.devices.parameter_map import mapped
line = mapped(zoo.load(sys.argv[1]).module, sys.argv[2], {asked!r}); os.kill(os.getpid(), 9)"""
    dead = subprocess.run([sys.executable, "-c", code, network, host.path], capture_output=True, check=False)
    assert dead.returncode == -signal.SIGKILL
    module = zoo.load(network).module
    line = mapped(module, host.path, asked)
    assert torch.isfinite(module.conv.weight).all()
    assert not gone(line)
    line.close()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "unknown"}, "the process that holds the parameters says: ValueError: network = 'unknown'"),
        ({"dtype": "float17"}, "AttributeError: .*float17"),
        ({"model": "OTHER"}, "the network that holds the parameters is another one"),
    ],
)
def test_what_cannot_be_shared_says_why_and_the_host_goes_on(host, network, change, words):
    change = {key: network.replace(":net", ":tokens") if word == "OTHER" else word for key, word in change.items()}
    module, asked = zoo.load(network).module, {"model": network, **FLOATS}
    before = module.conv.weight
    with pytest.raises(NotShared, match=words):
        mapped(module, host.path, asked | change)
    assert module.conv.weight is before
    mapped(module, host.path, asked).close()


def test_a_block_that_is_not_what_it_was_is_refused():
    module = Odd()
    block = pack(module, "cpu")
    told = exported(block)
    block.memory[0] += 1
    with pytest.raises(NotShared, match=r"the mapped block sums to -?\d+, not to -?\d+"):
        fill(module, told)
    with pytest.raises(NotShared, match="cannot be mapped"):
        fill(module, told | {"handle": [*told["handle"][:1], {"hex": b"/torch_gone".hex()}, 512]})


def test_one_connection_may_be_broken_or_silent_without_harm(network, monkeypatch):
    monkeypatch.setattr(parameter_host, "ASK_S", 0.1)
    holder = Holder("cpu")
    for deed in (lambda ours: ours.close(), lambda ours: None, lambda ours: ours.sendall(b"no json\n")):
        ours, theirs = socket.socketpair()
        with ours:
            deed(ours)
            threading.Thread(target=holder.greet, args=(theirs,)).run()
    ours, theirs = socket.socketpair()
    ours.sendall(parameter_host.encode({"model": network, **FLOATS}))
    holder.greet(theirs)
    assert b'"places"' in ours.recv(1 << 20)
    assert len(holder.blocks) == 1
    assert holder.lines == [theirs]
    ours.close()
    theirs.close()


@pytest.mark.slow
def test_the_host_ends_with_its_owner():
    code = """import os, sys; from dstack_lab.devices.parameter_host import ParameterHost
h = ParameterHost(sys.argv[1], {}, "cpu"); print(h.pid, flush=True); os.kill(os.getpid(), 9)"""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        owner = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=False)
        pid = int(owner.stdout)
        end = time.monotonic() + 20
        while Path(f"/proc/{pid}").exists() and time.monotonic() < end:
            time.sleep(0.05)
        assert not Path(f"/proc/{pid}").exists()


# A worker's backend


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_backend_computes_the_same_with_shared_parameters(gpu, host, precision):  # noqa: F811
    backend, _ = gpu(cuda={"graphs": False, "precision": precision})
    assert backend.load()["parameters"] == "own"
    sharing, _ = gpu(cuda={"graphs": False, "precision": precision, "parameters": host.path})
    told = sharing.load()
    assert (told["parameters"], "why_not_shared" in told) == ("shared", False)
    assert sharing.module.conv.weight.stride() == backend.module.conv.weight.stride()
    assert sharing.run([1, 5, 2]) == backend.run([1, 5, 2])
    sharing.lifeline.close()


def test_no_answer_is_given_once_the_parameters_are_gone(gpu, monkeypatch):  # noqa: F811
    backend, _ = gpu(cuda={"graphs": False})
    backend.load()
    backend.lifeline, theirs = socket.socketpair()  # as to a host
    assert len(backend.run([1])) == 1
    theirs.close()
    with pytest.raises(RuntimeError, match="the process that holds the parameters of all workers ended"):
        backend.run([1])
    backend.lifeline.close()


def test_a_backend_without_a_host_loads_its_own_and_says_why(gpu):  # noqa: F811
    backend, _ = gpu(cuda={"graphs": False, "parameters": "/nowhere"})
    told = backend.load()
    assert told["parameters"] == "own"
    assert "does not answer: " in told["why_not_shared"]
    assert len(backend.run([1])) == 1


# Under MPS


def test_workers_are_told_where_the_parameters_are(machine):  # noqa: F811
    with Mps() as device:
        with device.start("any", 50) as one, device.start("any", 25.76) as two:
            paths = {worker.wait_ready(30)["facts"]["env"]["DSTACK_LAB_PARAMETERS"] for worker in (one, two)}
            assert paths == {f"{one.daemon.root}/parameters"}
            (held,) = one.daemon._hosts
            assert held.alive
            assert device.marks() == ()
    assert not held.alive
    with Mps(share_parameters=False) as device, device.start("any", 50) as worker:
        assert "DSTACK_LAB_PARAMETERS" not in worker.wait_ready(30)["facts"]["env"]
        assert worker.daemon._hosts == []


def test_what_is_not_shared_is_marked_and_not_tried_again(machine):  # noqa: F811
    machine(FAKE_UNSHARED="no IPC in this container")
    with Mps() as device, device.start("any", 50) as one:
        one.wait_ready(30)
        assert one.note == "; it holds parameters of its own: no IPC in this container"
        assert device.marks() == ("own parameters: workers of a network do not share them: no IPC in this container",)
        with device.start("any", 25.76) as two:
            assert "DSTACK_LAB_PARAMETERS" not in two.wait_ready(30)["facts"]["env"]


def test_a_driver_that_hangs_while_it_maps_is_not_asked_again(machine, monkeypatch):  # noqa: F811
    machine(FAKE_HANG="1")
    with Mps() as device:
        with device.start("any", 50) as worker, pytest.raises(WorkerDied, match="parameters are shared no more"):
            worker.wait_ready(30)
        assert "did not map them within 30 s" in device.marks()[0]
        monkeypatch.delenv("FAKE_HANG")
        with device.start("any", 50) as other:
            assert "DSTACK_LAB_PARAMETERS" not in other.wait_ready(30)["facts"]["env"]


@pytest.mark.slow
def test_when_the_parameters_are_lost_all_workers_are_started_anew(machine):  # noqa: F811
    with Mps() as device:
        pids = []

        def kill():
            pids.append(device._daemon()._hosts[0].pid)
            os.kill(pids[0], signal.SIGKILL)

        kinds = served_once(trace := run_with(kill, device))
        assert kinds.count("all workers lost") == 1
        assert trace.events["detail"].iloc[0] == "the process that holds the parameters of all workers ended"
        assert device._daemon()._hosts[0].pid != pids[0]


@pytest.mark.slow
def test_a_profile_and_a_trace_say_that_parameters_are_not_shared(machine):  # noqa: F811
    import dstack_lab as lab

    machine(FAKE_UNSHARED="no IPC here")
    with Mps() as device:
        profile = lab.measure(["alexnet"], device=device, batches=[1], shares=[50, 100], seconds_per_point=0.05)
        trace = run_with(lambda: None, device)
    for marks in (profile.provenance.marks, trace.provenance.marks):
        assert "own parameters: workers of a network do not share them: no IPC here" in marks
