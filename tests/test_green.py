"""Green contexts without a GPU: who owns which SMs, one process for all tenants, what goes wrong and what helps."""

import argparse
import contextlib
import gc
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

import dstack_lab as lab
from dstack_lab.devices import Device, WorkerDied, WorkerFailed, green, green_backend, green_process, green_smid
from dstack_lab.devices.green import Green, GroupLeases, Proof, SmLedger, pick
from dstack_lab.devices.green_backend import GreenBackend
from dstack_lab.devices.green_driver import Driver, GreenError, Layout, layout_of, read_layout
from dstack_lab.devices.green_graphs import Captured, GraphPool
from dstack_lab.devices.mps_keeper import wait_gone
from dstack_lab.policies import Policy
from dstack_lab.worker import CpuBackend, answer

FAKES = Path(__file__).parent / "fakes"
sys.path.insert(0, str(FAKES / "green"))  # workers are given this path too
from fake_cuda import CUresult, FakeCuda  # noqa: E402

H100 = (8,) * 15 + (12,)

gpus = st.builds(
    lambda step, groups, rest: FakeCuda(step * groups + rest, groups, step),
    st.sampled_from([2, 4, 8]),
    st.integers(1, 20),
    st.integers(0, 20),
)


# The ledger


def test_the_device_is_cut_once_and_whole():
    fake = FakeCuda()
    ledger = SmLedger(module=fake)
    assert (ledger.groups, ledger.sms, ledger.free_sms) == (H100, 132, 132)
    one, other = ledger.lease(60), ledger.lease(64)
    assert (one.sms, other.sms, ledger.free_sms) == (60, 64, 8)  # 6 x 8 and the remainder of 12
    assert fake.calls.count("cuDevSmResourceSplitByCount") == 2  # how many, and the one cut
    assert not set(one.context.green) & set(other.context.green)


def test_shares_are_rounded_up_and_told():
    lease = SmLedger(module=FakeCuda()).lease(13)
    assert lease.sms == 16
    assert lease.gpu_pct == pytest.approx(100 * 16 / 132)


def test_contexts_are_made_once():
    fake = FakeCuda()
    ledger = SmLedger(module=fake)
    for _ in range(5):
        with ledger.lease(32) as lease:
            assert ledger.free_sms == 100
    lease.give()
    assert (fake.calls.count("cuGreenCtxCreate"), ledger.free_sms) == (1, 132)


def test_groups_of_two():
    ledger = SmLedger(fine=True, module=FakeCuda())
    assert ledger.groups == (2,) * 66
    assert ledger.lease(33).sms == 34


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"sms": 133}, "132 or less, the SMs of device 0"),
        ({"sms": 13}, "12 or less, the SMs that are free now: return a lease first"),
        ({"sms": 0}, "1 or more"),
        ({"groups": (0,)}, r"among the free ones \(15,\)"),
        ({"groups": (15, 15)}, "different"),
        ({"groups": (16,)}, "0 to 15"),
        ({"groups": ()}, "1 or more"),
        ({}, "one of the two"),
        ({"sms": 1, "groups": (1,)}, "one of the two"),
    ],
)
def test_asking_wrongly_changes_nothing(arguments, words):
    ledger = SmLedger(module=FakeCuda())
    ledger.lease(groups=range(15))
    with pytest.raises(ValueError, match=words):
        ledger.lease(**arguments)
    assert ledger.free == (15,)


def test_a_refused_context_takes_nothing():
    fake = FakeCuda()
    ledger = SmLedger(module=fake)
    fake.fail["cuGreenCtxCreate"] = CUresult.CUDA_ERROR_OUT_OF_MEMORY
    with pytest.raises(GreenError, match="CUDA_ERROR_OUT_OF_MEMORY: the GPU's memory is full"):
        ledger.lease(8)
    assert ledger.free_sms == 132
    fake.fail.clear()
    assert ledger.lease(8).sms == 8


def test_graphs_are_captured_on_a_stream_that_nobody_serves_on(monkeypatch):
    import torch

    streams, fake = [], FakeCuda()
    monkeypatch.setattr(fake, "cuGreenCtxStreamCreate", lambda green, *_: (0, streams.append(green) or len(streams)))
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda raw, device: raw)
    ledger = SmLedger(module=fake)
    found = [ledger.stream(groups, capture) for groups in ((0, 1), (2,), (1, 0)) for capture in (False, True, True)]
    assert found == [1, 2, 2, 3, 4, 4, 1, 2, 2]  # one to serve and one to capture on, each made once
    assert streams[0] is streams[1]  # of the same SMs
    assert streams[2] is streams[3]


def test_a_lease_of_another_ledger_is_refused():
    lease = SmLedger(module=FakeCuda()).lease(8)
    with pytest.raises(ValueError, match="one of this ledger"):
        SmLedger(module=FakeCuda()).give(lease)


def test_one_ledger_for_a_device(monkeypatch):
    monkeypatch.setattr(SmLedger, "_shared", {})
    ledger = SmLedger.of(module=FakeCuda())
    assert SmLedger.of() is ledger
    with pytest.raises(ValueError, match="fine = True: must be False, as in this process's first split"):
        SmLedger.of(fine=True)


@given(gpus, st.data())
def test_pick_wastes_least(fake, data):
    groups = SmLedger(module=fake).groups
    free = data.draw(st.sets(st.sampled_from(range(len(groups)))))
    sms = data.draw(st.integers(1, sum(groups) + 1))
    chosen = pick(groups, free, sms)
    free_sms = sum(groups[i] for i in free)
    assert bool(chosen) == (sms <= free_sms)
    assert set(chosen) <= free
    if chosen:
        granted = sum(groups[i] for i in chosen)
        reachable = {0}
        for i in free:
            reachable |= {sum_ + groups[i] for sum_ in reachable}
        assert granted == min(sum_ for sum_ in reachable if sum_ >= sms)


class Lending(RuleBasedStateMachine):
    """Leases come and go in any order."""

    @initialize(fake=gpus)
    def cut(self, fake):
        self.ledger, self.leases = SmLedger(module=fake), []

    @rule(sms=st.integers(1, 200))
    def lease(self, sms):
        before = self.ledger.free
        if sms > self.ledger.free_sms:
            with pytest.raises(ValueError, match="or less"):
                self.ledger.lease(sms)
            assert self.ledger.free == before
        else:
            lease = self.ledger.lease(sms)
            assert lease.sms >= sms
            self.leases.append(lease)

    @rule(data=st.data())
    def give(self, data):
        if self.leases:
            lease = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
            lease.give()
            lease.give()

    @invariant()
    def no_sm_is_lost_or_lent_twice(self):
        held = [sm for lease in self.leases for sm in lease.context.green]
        assert len(held) == len(set(held)) == sum(lease.sms for lease in self.leases)
        assert len(held) + self.ledger.free_sms == self.ledger.sms


def test_leases_never_meet():
    run_state_machine_as_test(Lending)


# What goes wrong, and what helps


@pytest.mark.parametrize(
    ("fake", "device", "words"),
    [
        (FakeCuda(version=12020), 0, r"speaks CUDA 12.2, green contexts need 12.4: update the driver to 550"),
        (FakeCuda(), 3, "CUDA_ERROR_INVALID_DEVICE: there is no GPU of this number"),
        (FakeCuda(fail={"cuDeviceGetDevResource": CUresult.CUDA_ERROR_NOT_SUPPORTED}), 0, r"\(MIG, vGPU\) has no green contexts"),
        (FakeCuda(sms=0), 0, "grants 0 SMs"),
        (SimpleNamespace(), 0, "cuda-bindings has no cuInit: update it"),
    ],
)
def test_errors_say_what_helps(fake, device, words):
    with pytest.raises(GreenError, match=words):
        read_layout(device, module=fake)


def test_a_gpu_too_small_to_be_cut(monkeypatch):
    monkeypatch.setattr(green, "layout_of", lambda device, fine: read_layout(device, fine, FakeCuda(sms=6)))
    assert Green().layout().groups == (6,)
    assert Green().shares() == (100.0,)
    assert Green().marks()[0].startswith("one group: only the share 100 exists")
    assert SmLedger(module=FakeCuda(sms=6)).lease(1).sms == 6


def test_cuda_bindings_are_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    monkeypatch.setitem(sys.modules, "cuda", None)
    with pytest.raises(GreenError, match=r"need the package cuda-bindings.*pip install 'dstack-lab\[gpu\]'"):
        Driver()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Failed to dlopen libcuda.so.1", "no NVIDIA driver .libcuda.so.1 not found.: install one"),
        ('Function "cuGreenCtxCreate" not found', "the driver has no cuInit .*: update the NVIDIA driver to 550"),
    ],
)
def test_no_driver_or_an_old_one(text, words):
    def cuInit(flags):
        raise RuntimeError(text)

    with pytest.raises(GreenError, match=words):
        Driver(SimpleNamespace(cuInit=cuInit)).open(0)


# The device


@pytest.fixture
def h100(monkeypatch):
    """Tell the parent that there is an H100 of 15 groups and 12 SMs."""
    monkeypatch.setattr(green, "layout_of", lambda device, fine: read_layout(device, fine, FakeCuda()))
    return Green()


def test_shares_come_from_the_groups(h100):
    assert isinstance(h100, Device)
    shares = h100.shares()
    assert shares[:3] == (6.06, 12.12, 18.18)
    assert (len(shares), shares[-2:]) == (16, (90.91, 100.0))
    assert [h100.units_for(share) for share in shares] == list(range(1, 17))
    assert h100.describe() == "Fake GPU, 132 SMs"
    assert h100.marks()[0].startswith("remainder: 12 of 132 SMs")


def test_a_small_remainder_comes_only_with_all(monkeypatch):
    monkeypatch.setattr(green, "layout_of", lambda device, fine: read_layout(device, fine, FakeCuda(132, 16, 8)))
    device = Green()
    assert device.layout().groups == (8,) * 16 + (4,)
    assert device.units_for(100) == 17
    assert max(max(home) for k in range(1, 16) for home in device.homes(k)) == 15
    leases, worker = device.leases(), tenant(16)
    leases.take(worker)
    assert worker.groups == tuple(range(16))


def test_a_large_remainder_is_marked(monkeypatch):
    monkeypatch.setattr(green, "layout_of", lambda device, fine: read_layout(device, fine, FakeCuda(142, 14, 8)))
    assert [mark for mark in Green().marks() if mark.startswith("large remainder: shares of more than 84.5 %")]


@pytest.mark.parametrize("places", [1, 2, 3, 20])
def test_homes_are_spread_over_the_device(h100, places):
    homes = Green(places=places).homes(6)
    assert homes[0] == tuple(range(6))
    assert all(len(home) == 6 and max(home) < 16 for home in homes)
    assert places == 1 or homes[-1] == tuple(range(10, 16))
    assert len(set(homes)) == len(homes) == min(places, 11)
    assert Green(places=places).homes(16) == (tuple(range(16)),)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"gpu_pct": 33}, r"8 of 132 SMs is the step\): 30.3 or 36.36"),
        ({"gpu_pct": 3}, r"step\): 6.06"),
        ({"gpu_pct": 0}, "from 1 to 100"),
        ({"gpu_pct": 6.06, "cores": (0,)}, "cores"),
        ({"gpu_pct": 6.06, "memory_mib": 100}, r"devices.Mps\(\) has caps"),
    ],
)
def test_bad_starts(h100, arguments, words):
    with pytest.raises(ValueError, match=words):
        h100.start("alexnet", **arguments)


@pytest.mark.parametrize(
    "arguments", [{"device": -1}, {"device": 0.5}, {"fine": 1}, {"places": 0}, {"precision": "int8"}, {"channels_last": 1}]
)
def test_bad_devices(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        Green(**arguments)


def tenant(units, homes=()):
    worker = SimpleNamespace(units=units, homes=tuple(homes), groups=())
    worker.use = lambda groups: setattr(worker, "groups", groups)
    return worker


def test_launches_get_groups_they_have_graphs_for(h100):
    leases = h100.leases()
    one, two, three = (tenant(5, h100.homes(5)) for _ in range(3))
    for worker in (one, two, three):
        leases.take(worker)
    assert (one.groups, two.groups, three.groups) == (tuple(range(5)), tuple(range(11, 16)), tuple(range(5, 10)))
    with pytest.raises(RuntimeError, match="holds groups already"):
        leases.take(one)
    with pytest.raises(RuntimeError, match="needs 2 groups of SMs, 1 are free"):
        leases.take(tenant(2))
    leases.give(one)
    leases.give(one)
    leases.give(two)
    leases.take(two)
    assert two.groups == tuple(range(11, 16))  # where it was


@given(st.lists(st.integers(1, 16), max_size=40), st.randoms())
def test_launches_never_meet(sizes, random):
    leases, running = GroupLeases(H100), []
    for size in sizes:
        worker = tenant(size)
        while running and sum(w.units for w in running) + size > 16:
            leases.give(running.pop(random.randrange(len(running))))
        leases.take(worker)
        running.append(worker)
        held = [group for w in running for group in w.groups]
        assert len(held) == len(set(held)) == sum(w.units for w in running)


def test_copies_of_a_share_have_places_of_their_own(h100):
    """With as many places as copies each runs where it has graphs, whoever came first."""
    for n in (2, 3, 4):
        units, device = 15 // n, Green(places=n)
        leases, copies = device.leases(), [tenant(units, device.homes(units)) for _ in range(n)]
        for _ in range(3):
            for worker in copies:
                leases.take(worker)
            assert all(worker.groups in worker.homes for worker in copies)
            assert len({group for worker in copies for group in worker.groups}) == n * units
            for worker in copies:
                leases.give(worker)
            copies.reverse()


# Graphs


class FakeGraphs:
    """As much of torch as `GraphPool` needs."""

    def __init__(self):
        self.log = []
        self.cuda = self
        self.CUDAGraph = lambda: SimpleNamespace(replay=lambda: self.log.append("replay"))

    def graph_pool_handle(self):
        self.log.append("pool")
        return "memory"

    def current_stream(self):
        return "current"

    def inference_mode(self):
        return self.stream(None)

    def stream(self, stream):
        return contextlib.nullcontext()

    def graph(self, graph, pool, stream, capture_error_mode):
        self.log.append(("capture", pool, stream.name, capture_error_mode))
        return self.stream(stream)


def test_a_graph_is_captured_once_on_the_stream_of_its_groups():
    torch = FakeGraphs()
    pool, calls, copies = GraphPool(torch), [], []
    stream = SimpleNamespace(name="lease", wait_stream=lambda other: None, synchronize=lambda: None)
    static = SimpleNamespace(copy_=lambda fresh, non_blocking: copies.append(fresh))
    example = SimpleNamespace(clone=lambda: static)

    def network(x):
        calls.append(x)
        return "answer"

    for groups in ((0, 1), (2, 3), (0, 1)):
        pool.capture(("alexnet", 4, groups), network, [example], stream)
    assert torch.log == ["pool", ("capture", "memory", "lease", "thread_local")] * 2
    assert (calls, len(pool)) == ([static] * 8, 2)  # three to warm up and one captured, for each place
    assert pool.get(("alexnet", 4, (0, 1))) is not pool.get(("alexnet", 4, (2, 3)))
    assert pool.get(("alexnet", 8, (0, 1))) is None
    assert pool.get(("alexnet", 4, (0, 1))).replay(["fresh"]) == "answer"
    assert (torch.log[-1], copies) == ("replay", ["fresh"])


class Lane(str):
    """A stream, known by its name."""

    __slots__ = ()

    def synchronize(self):
        """Nothing to wait for."""


class Clock:
    """An event; `refused` as by a driver that takes none on such a stream."""

    refused = False

    def record(self, stream):
        assert isinstance(stream, Lane)
        if self.refused:
            raise RuntimeError("CUDA error: invalid resource handle")

    def elapsed_time(self, end):
        return 1.5


class CudaOnCpu:
    """torch whose GPU is the CPU, and whose graphs compute anew when they are replayed."""

    def __init__(self, torch, log):
        self.torch, self.cuda, self.log = torch, self, log
        self.set_device = self.synchronize = lambda device: None
        self.Event = lambda enable_timing: Clock()

    def __getattr__(self, name):
        return getattr(self.torch, name)

    def stream(self, stream):
        self.log.append(stream)
        return contextlib.nullcontext()

    def capture(self, pool, key, function, inputs, stream):
        assert stream == f"capture {key[2]}"
        static = tuple(tensor.clone() for tensor in inputs)
        output = function(*static)
        graph = SimpleNamespace(replay=lambda: (self.log.append(f"graph {key}"), output.copy_(function(*static))))
        pool._graphs[key] = Captured(graph, static, output)


@pytest.mark.parametrize(
    ("precision", "channels_last", "near"), [("fp32", False, 1e-5), ("fp32", True, 1e-4), ("bf16", True, 0.1)]
)
def test_a_tenant_answers_as_a_worker_on_the_cpu_does(monkeypatch, precision, channels_last, near):
    import torch

    log = []
    fake = CudaOnCpu(torch, log)
    monkeypatch.setattr(SmLedger, "_shared", {})
    monkeypatch.setattr(
        SmLedger, "stream", lambda self, groups, capture=False: Lane(f"{'capture' if capture else 'stream'} {groups}")
    )
    monkeypatch.setattr(green_backend, "torch_with_cuda", lambda: fake)
    monkeypatch.setattr(green_backend, "_networks", {})
    monkeypatch.setattr(GreenBackend, "kind", "cpu")
    monkeypatch.setattr(GraphPool, "capture", lambda self, *arguments: fake.capture(self, *arguments))
    SmLedger.of(module=FakeCuda())
    common = {
        "model": "squeezenet1_1",
        "weights": None,
        "seed": 3,
        "pool": 4,
        "precision": precision,
        "channels_last": channels_last,
    }
    tenant_only = {"device": 0, "fine": False, "graphs": True, "batches": [2]}
    home, away = (0, 1), (2, 3)
    tenants = [GreenBackend(argparse.Namespace(homes=[home, (14, 15)], **tenant_only, **common)) for _ in range(2)]
    facts = [tenant.load() for tenant in tenants]
    assert facts[0] == {"groups": H100, "granted_sms": 16, "sms": 132, "graphs": 2}
    assert tenants[0].module is tenants[1].module  # parameters are shared
    ours, theirs = (tenant.graphs.get(("squeezenet1_1", 2, home)) for tenant in tenants)
    held = [[*captured.inputs, captured.output] for captured in (ours, theirs)]
    assert not {t.data_ptr() for t in held[0]} & {t.data_ptr() for t in held[1]}  # nothing else is: both may run at once
    assert {str(p.dtype) for p in tenants[0].module.parameters()} == {{"fp32": "torch.float32"}.get(precision, "torch.bfloat16")}
    with torch.inference_mode():
        assert tenants[0]._gather([0, 1])[0].is_contiguous(memory_format=torch.channels_last) == channels_last
    reference = CpuBackend(argparse.Namespace(threads=torch.get_num_threads(), **common))
    monkeypatch.setattr(torch, "set_num_interop_threads", lambda threads: None)
    reference.load()
    tenants[0].serving = True
    for groups, inputs, path in (
        (home, [1, 6], "graph"),
        (home, [3], "padded"),
        (home, [3, 1, 2], "eager"),  # larger than all that were captured
        (away, [0, 1], "eager"),
        ((14, 15), [2, 3], "graph"),
    ):
        tenants[0].use(groups)
        log.clear()
        answers, expected = tenants[0].run(inputs), reference.run(inputs)
        if precision == "fp32":  # two classes may be level in fewer digits
            assert [c for c, _ in answers] == [c for c, _ in expected]
        assert [score for _, score in answers] == pytest.approx([score for _, score in expected], rel=near)
        assert (tenants[0].facts()["path"], tenants[0].gpu_ms) == (path, 1.5)
        assert log == [f"stream {groups}", *([] if path == "eager" else [f"graph {('squeezenet1_1', 2, groups)}"])]
    monkeypatch.setattr(Clock, "refused", True)
    assert len(tenants[0].run([1])) == 1
    assert math.isnan(tenants[0].gpu_ms)  # not a number that nobody measured
    assert "gpu_ms" not in answer(tenants[0], {"op": "run", "inputs": [1]})
    assert tenants[0].facts()["granted_sms"] == 20  # with the remainder
    assert tenants[0].ledger.free_sms == 132
    with tenants[0].ledger.lease(groups=[0]):
        tenants[0].use(home)
        with pytest.raises(ValueError, match="among the free ones"):
            tenants[0].run([1])
        tenants[1].run([1])  # it still loads
    eager = GreenBackend(argparse.Namespace(homes=[home], **{**tenant_only, "graphs": False}, **common))
    assert eager.load()["graphs"] == 0
    eager.run([0, 1])
    assert eager.path == "eager"


# The proof


def test_the_proof_is_judged():
    assert Proof(((0, 2), (1, 3, 4)), (2, 3))
    meet = Proof(((0, 1, 2), (2, 3, 4)), (3, 3))
    assert (meet.disjoint, meet.exact, meet.shared, bool(meet)) == (False, True, (2,), False)
    assert "3 of 3, 3 of 3; they meet on 1 SMs: [2]" in str(meet)
    few = Proof(((0,), (1, 2)), (2, 2))
    assert (few.disjoint, bool(few)) == (True, False)
    assert "no SM is shared" in str(few)


@pytest.mark.slow
def test_the_proof_needs_cuda():
    if __import__("torch").cuda.is_available():
        pytest.skip("torch has CUDA here")
    with pytest.raises(GreenError, match=r"torch .* (without CUDA|finds no GPU)"):
        lab.devices.verify_disjoint(64, 64)
    with pytest.raises(ValueError, match="sms"):
        lab.devices.verify_disjoint(0)


@pytest.fixture
def prover(monkeypatch, capsys):
    """`verify_disjoint` in this process, with a kernel that sees the SMs of the fake context it runs on."""
    monkeypatch.setattr(SmLedger, "_shared", {})
    ledger = SmLedger.of(module=FakeCuda())
    monkeypatch.setattr(SmLedger, "stream", lambda self, groups: self.context(groups).green)
    monkeypatch.setattr(green_smid, "torch_with_cuda", lambda: None)
    monkeypatch.setattr(green_smid, "sms_seen", lambda streams, sms, device: tuple(map(tuple, streams)))

    def run(command, **_):
        status = green_smid.main(command[3:])
        return SimpleNamespace(returncode=status, stdout="a library's words\n" + capsys.readouterr().out, stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    return ledger


@pytest.mark.parametrize(("sms", "granted"), [((), (64, 68)), ((64, 64), (64, 68)), ((8, 8, 13), (8, 8, 16)), ((132,), (132,))])
def test_shares_are_proven_apart(prover, sms, granted):
    proof = lab.devices.verify_disjoint(*sms)
    assert proof
    assert proof.granted == granted
    assert prover.free_sms == 132


@pytest.mark.parametrize("sms", [(100, 100), (65, 65)])  # 65 and 65 are 130, but not in groups of 8
def test_too_many_sms_to_prove(prover, sms):
    with pytest.raises(ValueError, match="or less"):
        lab.devices.verify_disjoint(*sms)
    assert prover.free_sms == 132


def test_a_proof_that_crashes_says_so(monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=-11, stdout="", stderr="its last words"))
    with pytest.raises(GreenError, match="status -11: its last words"):
        lab.devices.verify_disjoint()


# The process of all tenants


@pytest.fixture
def sleepers(h100, monkeypatch):
    """Networks that sleep, in a real host process with a fake driver."""
    monkeypatch.setattr(green_process, "BACKEND", "fake_cuda:Sleeper")
    yield h100
    assert not [host for host in green_process.Host._live.values() if host.alive]


def test_tenants_share_one_process_and_run_side_by_side(sleepers):
    with sleepers.start("sleep-300", 30.3, batches=[1]) as one, sleepers.start("sleep-300", 48.48) as other:
        facts = [worker.wait_ready(30)["facts"] for worker in (one, other)]
        assert [fact["granted_sms"] for fact in facts] == [40, 64]
        assert one.pid == other.pid
        leases = sleepers.leases()
        for worker in (one, other):
            leases.take(worker)
            worker.send({"op": "run", "id": worker.model, "inputs": [3, 4]})
        first, second = one.receive(5), other.receive(5)
        assert first["outputs"] == [[3, 0.5], [4, 0.5]]
        assert (first["granted_sms"], second["granted_sms"], second["path"]) == (
            40,
            68,
            "graph",
        )  # the right end has the remainder
        assert abs(first["start_ms"] - second["start_ms"]) < 300
        assert first["cpu_ms"] < 150
    assert not one.alive


def test_two_tenants_on_the_same_sms_are_refused(sleepers):
    with sleepers.start("sleep-200", 30.3) as one, sleepers.start("sleep-200", 30.3) as other:
        one.wait_ready(30), other.wait_ready(30)
        one.send({"op": "run", "inputs": [1]})
        time.sleep(0.05)
        other.send({"op": "run", "inputs": [1]})
        assert "among the free ones" in other.receive(5)["message"]
        assert one.receive(5)["reply"] == "run"
        other.use([99])
        other.send({"op": "run", "id": 5, "inputs": [1]})
        assert other.receive(5)["id"] == 5


def test_out_of_memory_ends_one_tenant(sleepers):
    with sleepers.start("oom-1", 30.3) as one, sleepers.start("sleep-1", 30.3) as other:
        one.wait_ready(30), other.wait_ready(30)
        one.send({"op": "run", "inputs": [1, 2]})
        assert one.receive(5)["error"] == "out_of_memory"
        one.kill()
        one.kill()
        assert not one.alive
        assert other.ask({"op": "run", "inputs": [1]}, 5)["reply"] == "run"
        with sleepers.start("sleep-1", 6.06) as third:
            assert third.wait_ready(30)["pid"] == other.pid


def test_a_fault_or_a_forced_end_ends_all(sleepers):
    for model, ending in (("fault-1", "receive"), ("sleep-5000", "kill")):
        one, other = sleepers.start(model, 30.3), sleepers.start("sleep-1", 30.3)
        one.wait_ready(30), other.wait_ready(30)
        one.send({"op": "run", "inputs": [1, 2]})
        getattr(one, ending)()
        with pytest.raises(WorkerDied):
            other.receive(5)
        assert not other.alive
        one.kill(), other.kill()


def test_a_network_that_does_not_exist(sleepers):
    with pytest.raises(ValueError, match="network = 'unknown'"):
        with sleepers.start("unknown", 30.3) as worker:
            worker.wait_ready(30)


def test_a_gpu_cut_otherwise_than_believed(sleepers, monkeypatch):
    layout = Layout(0, "Fake GPU", 13000, 132, (8,) * 16 + (4,), 8, False)
    monkeypatch.setattr(green, "layout_of", lambda device, fine: layout)
    with pytest.raises(WorkerFailed, match="start this program anew"):
        with sleepers.start("sleep-1", 30.3) as worker:
            worker.wait_ready(30)


def test_a_device_lives_with_one_split(sleepers):
    with sleepers.start("sleep-1", 30.3):
        with pytest.raises(ValueError, match="close them"):
            Green(fine=True).start("sleep-1", 30.3)


def sleepy_plan():
    rows = [
        (model, batch, pct, ms * (0.5 + batch / 8) * (1 if pct > 40 else 2))
        for model, ms in (("sleep-5", 5.0), ("sleep-8", 8.0))
        for batch in (1, 2, 4, 8)
        for pct in (18.18, 36.36, 48.48, 66.67, 100.0)
    ]
    table = pd.DataFrame(rows, columns=["model", "batch", "gpu_pct", "service_ms"])
    profile = lab.Profile(table, lab.Provenance("simulated", "Fake GPU", "model"))
    services = [lab.Service(f"sleep-{n}", slo_ms=400, arrivals=lab.Poisson(rate_rps=40)) for n in (5, 8)]
    return lab.optimize(services, profile)


def test_the_profiler_measures_green_contexts(sleepers):
    profile = lab.measure("my:sleep-4", sleepers, [1, 2], [18.18, 100], seconds_per_point=0.1, progress=False)
    assert sorted(profile.table["gpu_pct"].unique()) == [18.18, 100]
    assert (profile.table["service_ms"] >= 4).all()
    assert profile.provenance.mechanism == "green contexts"


def test_policies_run_on_green_contexts(sleepers):
    trace = lab.run(sleepy_plan(), lab.DStack(), sleepers, duration_ms=800, seed=1)
    assert set(trace.events["kind"]) <= {"no graph"}  # the double prepares two places
    assert (trace.requests["outcome"] == "served").all()
    assert (trace.requests["answer"] >= 0).all()
    assert set(trace.launches["path"]) <= {"graph", "eager"}
    asked = trace.launches["gpu_pct"] * 132 / 100
    assert (trace.launches["effective_sms"] >= asked - 0.1).all()
    assert trace.provenance.mechanism == "green contexts"
    assert [mark for mark in trace.provenance.marks if mark.startswith("remainder")]


@pytest.mark.parametrize("deed", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hung"])
def test_a_lost_process_is_replaced_and_no_request_is_lost(sleepers, deed):
    def strike():
        (host,) = green_process.Host._live.values()
        os.kill(host.process.pid, deed)

    class Striking(lab.DStack):
        """Strikes once, in the middle of a batch."""

        struck = False

        def decide(self, state):
            decisions = super().decide(state)
            if not Striking.struck and state.now_ms > 200 and any(isinstance(d, lab.Launch) for d in decisions):
                Striking.struck = True
                strike()
            return decisions

    trace = lab.run(sleepy_plan(), Striking(), sleepers, duration_ms=800, seed=1, drain_ms=30_000, hung_ms=300)
    kinds = trace.events["kind"].tolist()
    assert set(kinds) <= {"worker died", "worker hung", "retried", "worker ready"}
    assert ("worker hung" in kinds) == (deed == signal.SIGSTOP)
    ready = trace.events.loc[trace.events["kind"] == "worker ready", "service"].value_counts()
    copies, shares = lab.DStack().copies(sleepy_plan()), lab.DStack().shares(sleepy_plan())
    assert ready.to_dict() == {service: copies * len(mine) for service, mine in shares.items()}
    served = trace.requests["outcome"] == "served"
    assert served.mean() > 0.5
    assert set(trace.requests.loc[~served, "outcome"]) <= {"dropped"}  # by the policy: too late
    assert ((trace.requests["answer"] >= 0) == served).all()


class Pairs(Policy):
    """Launches up to two batches of each service at once at a third of the GPU."""

    share = 30.3

    def copies(self, plan):
        return 2

    def shares(self, plan):
        return {a.service: (self.share,) for a in plan.allocations}

    def decide(self, state):
        found, free = [], state.free_pct
        for view in state.services:
            waiting = view.waiting
            for _ in range(2 - view.in_flight):
                if waiting and free >= self.share:
                    found.append(lab.Launch(view.name, self.share, 1))
                    waiting, free = waiting - 1, free - self.share
        return found


def paired(*models):
    """A plan of networks that are said to take 5 ms."""
    rows = [(m, b, g, 5.0) for m in models for b in (1, 2) for g in (30.3, 100.0)]
    table = pd.DataFrame(rows, columns=["model", "batch", "gpu_pct", "service_ms"])
    profile = lab.Profile(table, lab.Provenance("simulated", "Fake GPU", "model"))
    return lab.optimize([lab.Service(m, 5000, lab.Poisson(60)) for m in models], profile)


def at_once(launches):
    """Pairs of launches of one service that ran beside each other."""
    rows = launches[["service", "start_ms", "end_ms"]].to_numpy()
    return sum(a[0] == b[0] and a[1] < b[2] and b[1] < a[2] for i, a in enumerate(rows) for b in rows[:i])


def test_two_copies_of_a_share_serve_at_once_in_places_of_their_own(sleepers):
    trace = lab.run(paired("sleep-20", "sleep-30"), Pairs(), Green(places=3), duration_ms=500, seed=1)
    assert trace.events.empty  # each in a place that it has graphs for
    assert (trace.requests["outcome"] == "served").all()
    assert at_once(trace.launches) > 0
    assert set(trace.launches["path"]) == {"graph"}
    assert set(trace.launches["effective_sms"]) <= {40, 44}


def test_a_copy_without_a_place_of_its_own_runs_eagerly_and_the_trace_names_the_cure(sleepers):
    trace = lab.run(paired("sleep-20", "sleep-30"), Pairs(), Green(places=1), duration_ms=400, seed=1)
    assert (trace.requests["outcome"] == "served").all()
    assert set(trace.launches["path"]) == {"graph", "eager"}
    assert set(trace.events["kind"]) == {"no graph"}
    told = "batch 1 at 30.3 % ran eagerly: no CUDA graph of its own there; raise Green(places=1)"
    assert set(trace.events["detail"]) == {told}


def test_one_copy_is_replaced_and_its_process_and_the_other_copy_stay(sleepers):
    """Request 3 of the glutton never fits in memory, alone or not."""
    trace = lab.run(paired("glutton-20", "sleep-20"), Pairs(), Green(places=3), duration_ms=500, seed=1, drain_ms=30_000)
    assert at_once(trace.launches) > 0
    for model, mine in trace.requests.groupby("service", observed=True):
        lost = [3] if model == "glutton-20" else []
        answers = [-1 if i in lost else i for i in range(len(mine))]
        assert mine["answer"].tolist() == answers
        assert (mine["outcome"] == "dropped").tolist() == [i in lost for i in range(len(mine))]
    kinds = [kind for kind in trace.events["kind"] if kind != "worker ready"]
    assert kinds == ["out of memory", "retried", "out of memory", "gave up"]


@pytest.mark.parametrize("deed", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hung"])
def test_copies_come_back_with_their_process(sleepers, deed):
    class Striking(Pairs):
        struck = False

        def decide(self, state):
            if not self.struck and state.now_ms > 200 and len(state.running) > 2:
                self.struck = True
                (host,) = [host for host in green_process.Host._live.values() if host.alive]
                os.kill(host.process.pid, deed)
            return super().decide(state)

    trace = lab.run(
        paired("sleep-20", "sleep-30"), Striking(), Green(places=3), duration_ms=600, seed=1, drain_ms=30_000, hung_ms=300
    )
    assert (trace.requests["outcome"] == "served").all()
    for _, mine in trace.requests.groupby("service", observed=True):
        assert mine["answer"].tolist() == list(range(len(mine)))
    found = trace.events["kind"].tolist()
    assert found.count("worker ready") == 4
    assert set(found) <= {"worker died", "worker hung", "retried", "worker ready"}


def test_a_batch_that_never_fits_in_memory_is_given_up_and_the_others_go_on(sleepers):
    rows = [(m, b, g, 5.0) for m in ("glutton-5", "sleep-5") for b in (1, 2) for g in (48.48, 100.0)]
    profile = lab.Profile(
        pd.DataFrame(rows, columns=["model", "batch", "gpu_pct", "service_ms"]), lab.Provenance("simulated", "Fake GPU", "model")
    )
    plan = lab.optimize([lab.Service(m, 5000, lab.Poisson(40)) for m in ("glutton-5", "sleep-5")], profile)
    pids = set()

    class Noting(lab.Temporal):
        def decide(self, state):
            pids.update(host.process.pid for host in green_process.Host._live.values())
            return super().decide(state)

    trace = lab.run(plan, Noting(), sleepers, duration_ms=500, seed=1, drain_ms=30_000)
    assert (trace.requests.loc[trace.requests["service"] == "sleep-5", "outcome"] == "served").all()
    mine = trace.requests[trace.requests["service"] == "glutton-5"].reset_index(drop=True)
    assert mine.loc[3, "outcome"] == "dropped"  # the fourth request never fits; its batch may have held one or two
    assert (mine["outcome"] == "dropped").sum() <= 2
    kinds = ["out of memory", "retried", "worker ready", "out of memory", "gave up", "worker ready"]
    assert trace.events["kind"].tolist() == kinds
    assert set(trace.events["service"]) == {"glutton-5"}
    assert len(pids) == 1  # one tenant went, the process stayed


def test_ctrl_c_in_a_run_leaves_no_process(sleepers):
    code = """import sys; sys.path.insert(0, 'tests')
import test_green as t; from test_green import green, green_process, lab, FakeCuda, Green, read_layout, sleepy_plan
green.layout_of = lambda device, fine: read_layout(device, fine, FakeCuda())
green_process.BACKEND = "fake_cuda:Sleeper"
class Loud(lab.DStack):
    def decide(self, state):
        print(*(host.process.pid for host in green_process.Host._live.values()), flush=True)
        return super().decide(state)
lab.run(sleepy_plan(), Loud(), Green(), duration_ms=60_000, seed=1)"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=FAKES.parents[1], start_new_session=True
    ) as owner:
        (pid,) = map(int, owner.stdout.readline().split())
        os.killpg(owner.pid, signal.SIGINT)  # as a terminal does
        said = owner.communicate(timeout=60)[1]
    assert "KeyboardInterrupt" in said
    assert not wait_gone(pid, 0, 20)


def test_a_forgotten_worker_leaves_nothing_running(sleepers):
    worker = sleepers.start("sleep-1", 30.3)
    process = worker.host.process
    worker.wait_ready(30)
    del worker
    gc.collect()
    assert process.poll() is not None


# cuda-bindings for real, on a stub of the driver


@pytest.fixture(scope="module")
def stub(tmp_path_factory):
    """Folder with a libcuda.so.1 that needs no GPU."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler to build the stub driver")
    pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed (the extra `gpu`)", exc_type=ImportError)
    folder = tmp_path_factory.mktemp("stub")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", folder / "libcuda.so.1", FAKES / "stub_cuda.c"], check=True)
    return folder


def on_stub(stub, code, **settings):
    """What a fresh interpreter prints with the stub as its driver."""
    env = {**os.environ, "LD_LIBRARY_PATH": str(stub), "PYTHONPATH": str(Path(lab.__file__).parents[1]), **settings}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


LEND = """
import json
from dstack_lab.devices.green_ledger import SmLedger
ledger = SmLedger(fine={fine})
one, two = ledger.lease(50), ledger.lease(50)
left = ledger.free_sms
try:
    ledger.lease(left + 1)
except ValueError as error:
    said = str(error)
rest = ledger.lease(left)
raw = [int(lease.context.raw) > 0 for lease in (one, two, rest)]
print(json.dumps([ledger.groups, [one.sms, two.sms, rest.sms], set(one.groups).isdisjoint(two.groups), said, raw]))
"""


@pytest.mark.parametrize(
    ("settings", "fine", "groups", "granted"),
    [
        ({}, False, [8] * 15 + [12], [52, 56, 24]),
        ({}, True, [2] * 66, [50, 50, 32]),
        ({"STUB_GROUPS": "16"}, False, [8] * 16 + [4], [52, 56, 24]),
        ({"STUB_SMS": "114", "STUB_GROUPS": "14"}, False, [8] * 14 + [2], [50, 56, 8]),
    ],
)
def test_cuda_bindings_lend_groups(stub, settings, fine, groups, granted):
    found, sms, disjoint, said, raw = on_stub(stub, LEND.format(fine=fine), **settings)
    assert (found, sms, disjoint, raw) == (groups, granted, True, [True] * 3)
    assert f"{granted[2]} or less" in said


def test_the_parent_asks_in_another_process(stub, monkeypatch):
    monkeypatch.setenv("LD_LIBRARY_PATH", str(stub))
    layout_of.cache_clear()
    try:
        assert layout_of(0, False) == Layout(0, "Stub GPU", 13000, 132, H100, 8, False)
        with pytest.raises(GreenError, match="there is no GPU of this number"):
            Green(device=1).shares()
    finally:
        layout_of.cache_clear()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"STUB_VERSION": "12030"}, "speaks CUDA 12.3"),
        ({"STUB_FAIL": "cuInit=100"}, "CUDA_ERROR_NO_DEVICE: the driver sees no GPU"),
        ({"STUB_FAIL": "cuDeviceGetDevResource=801"}, "MIG"),
        ({"STUB_FAIL": "cuDevSmResourceSplitByCount=914"}, "CUDA_ERROR_INVALID_RESOURCE_TYPE"),
        ({"STUB_FAIL": "cuInit=46"}, "exclusive"),
        ({"STUB_FAIL": "cuInit=802"}, "CUDA_ERROR_SYSTEM_NOT_READY: .* nvidia-fabricmanager"),
        ({"STUB_FAIL": "cuInit=804"}, "hides the driver's: unset LD_LIBRARY_PATH"),
        ({"STUB_FAIL": "cuInit=999"}, "CUDA_ERROR_UNKNOWN: .* nvidia-smi"),
        ({"STUB_FAIL": "cuInit=3"}, "CUDA_ERROR_NOT_INITIALIZED: see whether nvidia-smi answers"),
        ({"STUB_SMS": "0", "STUB_GROUPS": "0"}, "grants 0 SMs: .* check nvidia-smi"),
        ({"LD_LIBRARY_PATH": "/nowhere"}, r"no NVIDIA driver \(libcuda.so.1 not found\): install one, or start the container"),
    ],
)
def test_the_drivers_errors_become_sentences(stub, monkeypatch, settings, words):
    for name, value in {"LD_LIBRARY_PATH": str(stub), **settings}.items():
        monkeypatch.setenv(name, value)
    layout_of.cache_clear()
    with pytest.raises(GreenError, match=words):
        layout_of(0, False)
