"""What the agenda asks of the GPU itself, on one that is pretended: streams know their SMs, kernels note them."""

from __future__ import annotations

import contextlib
import gzip
import json
import multiprocessing
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch as real
from fakes.green.fake_cuda import FakeCuda
from test_agenda_kernels import TRACE, check

from dstack_lab import zoo
from dstack_lab.agenda import kernels, meters, probe, silicon
from dstack_lab.agenda.target import Target
from dstack_lab.devices import green_driver, green_ledger
from dstack_lab.devices.green_ledger import SmLedger

FAKES = Path(__file__).parent / "fakes"


class Stream:
    def __init__(self, sms):
        self.sms = tuple(sms)

    def synchronize(self):
        """All is done at once here."""


class Silicon:
    """torch whose ``cuda`` runs every kernel on the SMs of the current stream, or of the stream its graph was captured on.

    Parameters
    ----------
    sms : int
        SMs that this process was granted.
    lacks : str
        What this torch or driver cannot do: ``"kernels"``, ``"own capture"`` (without ``stream=``).
    """

    __version__ = "2.11.0+fake"

    def __init__(self, sms=132, lacks=""):
        self.version, self.cuda, self.lacks = SimpleNamespace(cuda="13.0"), self, lacks
        self.whole = Stream(range(sms))
        self.on, self.capturing, self.launched = self.whole, None, []
        self.backends = SimpleNamespace(cudnn=SimpleNamespace(version=lambda: 91000))

    def __getattr__(self, name):
        return getattr(real, name)

    def zeros(self, *shape, device=None, **options):
        return real.zeros(*shape, **options)

    def randn(self, *shape, device=None):
        return real.randn(*shape)

    def get_device_properties(self, index):
        sms = len(self.whole.sms)
        return SimpleNamespace(name="Fake", major=9, minor=0, multi_processor_count=sms, total_memory=80 << 30)

    def get_arch_list(self):
        return ["sm_90"]

    def synchronize(self, device=0):
        """All is done at once here."""

    def current_stream(self):
        return self.on

    default_stream = current_stream

    def ExternalStream(self, raw, device):
        return self.streams[raw]

    @contextmanager
    def stream(self, stream):
        before, self.on = self.on, stream
        yield
        self.on = before

    def CUDAGraph(self):
        graph = SimpleNamespace(work=[])
        graph.replay = lambda: [work() for work in graph.work]
        return graph

    @contextmanager
    def graph(self, graph, capture_error_mode, stream=None):
        if stream is None and self.lacks == "own capture":
            raise RuntimeError("operation not permitted when stream is capturing")
        self.capturing = graph
        with self.stream(stream or self.whole):  # torch's own side stream has all SMs
            yield
        self.capturing = None

    def _compile_kernel(self, source, name):
        if self.lacks == "kernels":
            raise RuntimeError("libnvrtc.so.13: cannot open shared object file")
        assert name in source

        def kernel(grid, block, args):
            seen, _ = args
            sms = list(self.on.sms)
            assert grid[0] >= len(sms)  # else not every SM could be seen
            work = lambda: seen.index_add_(0, real.tensor(sms), real.ones(len(sms), dtype=real.int32))  # noqa: E731
            (self.capturing.work.append if self.capturing else lambda work: work())(work)
            time.sleep(0.001)

        return kernel


@pytest.fixture
def machine(monkeypatch):
    """Give a function that pretends a GPU; green contexts are those of the fake driver, 15 groups of 8 SMs and 12 over."""

    def pretend(**options):
        fake, cuda = Silicon(**options), FakeCuda()
        fake.streams = {7: None}

        def stream(self, groups):
            sms = [sm for i in self._known(groups) for sm in self._resources[i].parts]
            return Stream(sms)

        monkeypatch.setattr(silicon, "torch_with_cuda", lambda: fake)
        monkeypatch.setattr(silicon, "Driver", lambda: green_driver.Driver(cuda))
        monkeypatch.setattr(green_ledger.SmLedger, "_shared", {})
        monkeypatch.setattr(green_ledger.SmLedger, "stream", stream)
        SmLedger.of(0, module=cuda)
        return fake

    return pretend


def test_what_starts_is_told_with_its_cost(machine):
    machine()
    found = silicon.start()
    assert (found["torch"], found["cuda"], found["sms"], found["cudnn"]) == ("2.11.0+fake", "13.0", 132, 91000)
    assert min(found["import_s"], found["cuda_s"], found["compile_s"]) >= 0
    json.dumps(found)
    machine(lacks="kernels")
    assert silicon.start()["no_smid"] == "RuntimeError: libnvrtc.so.13: cannot open shared object file"


def test_a_share_is_read_back_by_number_and_by_name(machine):
    machine(sms=66)
    found = silicon.sms(seconds=0.01)
    assert (found["sms"], found["seen"], found["mps"]) == (66, list(range(66)), False)
    assert found["begin"] < found["end"]
    late = silicon.sms(seconds=0.01, at=time.monotonic() - 1)
    assert late["late_s"] >= 1
    early = silicon.sms(seconds=0.01, at=(at := time.monotonic() + 0.2))
    assert (early["begin"] >= at, early["late_s"]) == (True, 0)


def test_without_kernels_the_number_is_still_read_back(machine):
    machine(sms=34, lacks="kernels")
    found = silicon.sms()
    assert (found["sms"], found["seen"]) == (34, [])
    assert "libnvrtc" in found["no_smid"]


def test_a_load_says_when_it_begins_and_where_it_runs(machine, capsys):
    machine()
    found = silicon.spin(lease_sms=64, seconds=0.05)
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["begin"] == found["begin"] < found["end"]
    assert (found["sms"], found["seen"]) == (64, 64)
    assert silicon.spin(seconds=0.01)["sms"] == 132


def test_a_graph_keeps_the_sms_of_the_stream_it_was_captured_on(machine):
    machine()
    found = silicon.graph()
    assert found["granted"] == found["seen_eager"] == 68  # 7 x 8 and the remainder of 12
    for place in ("own", "other", "default"):
        assert found[f"with_stream_replayed_on_{place}"] == {"sms": 68, "inside_lease": True}
        assert found[f"without_stream_replayed_on_{place}"] == {"sms": 132, "inside_lease": False}
    json.dumps(found)


def test_one_capture_that_fails_does_not_lose_the_other(machine):
    machine(lacks="own capture")
    found = silicon.graph()
    assert found["with_stream_replayed_on_other"]["inside_lease"]
    assert found["without_stream"] == "RuntimeError: operation not permitted when stream is capturing"


def test_the_driver_s_layout_and_the_cost_of_contexts_are_told(machine):
    machine()
    assert silicon.layout() == {
        **{"cuda": 13000, "sms": 132, "least": 8, "alignment": 8},
        **{"coarse": [8] * 15 + [12], "fine": [2] * 66},
    }
    cost = silicon.green_cost(times=3)
    assert len(cost["context_ms"]) == len(cost["stream_ms"]) == 3
    assert min(cost["context_median_ms"], cost["stream_median_ms"]) >= 0


@pytest.mark.slow
def test_a_tensor_is_read_by_a_child_without_a_copy(monkeypatch):
    """The same calls on memory of this machine."""
    monkeypatch.setattr(silicon, "torch_with_cuda", lambda: real)
    before = set(multiprocessing.active_children())  # workers that another test left behind
    found = silicon.ipc("cpu")
    assert (found["sum"], found["right"], found["shared"]) == (499500.0, True, True)
    assert set(multiprocessing.active_children()) <= before


class Recorded:
    """torch.profiler's profile, whose trace is one written by hand."""

    content = TRACE

    def __init__(self, activities):
        assert [str(activity).rsplit(".", 1)[1] for activity in activities] == ["CPU", "CUDA"]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def export_chrome_trace(self, path):
        Path(path).write_text(json.dumps(self.content), encoding="utf-8")


def test_the_keys_of_a_kernel_s_record_are_told(machine, monkeypatch):
    machine()
    monkeypatch.setattr("torch.profiler.profile", Recorded)
    found = silicon.kineto()
    assert found["keys"] == ["block", "device", "grid", "registers per thread", "shared memory", "stream"]
    assert (found["event"]["name"], found["device"][0]["numSms"]) == ("relu", 132)
    monkeypatch.setattr(Recorded, "content", {"traceEvents": []})
    with pytest.raises(RuntimeError, match="no kernel records: CUPTI is not available here"):
        silicon.kineto()


def test_a_network_is_traced_in_half_precision_and_kept_slim(machine, monkeypatch, tmp_path):
    """The network is one convolution; on the GPU it would be half precision, channels last and warmed up three times."""
    calls = []

    class Net(real.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = real.nn.Conv2d(3, 2, 3)

        def forward(self, x):
            calls.append((x.dtype, self.conv.weight.dtype, x.is_contiguous(memory_format=real.channels_last), len(x)))
            return x

    def load(name, device):
        assert (name, device) == ("any", "cuda")
        return zoo.Network(name, Net(), lambda batch: (real.randn(batch, 3, 8, 8),))

    machine()
    monkeypatch.setattr(green_driver, "torch_with_cuda", silicon.torch_with_cuda)
    monkeypatch.setattr(zoo, "load", load)
    monkeypatch.setattr(real.Tensor, "cuda", lambda self: self)
    monkeypatch.setattr("torch.profiler.profile", Recorded)
    path = tmp_path / "net.json.gz"
    told = silicon.ALL["trace"](model="any", batch=4, path=str(path))
    assert told == {"precision": "fp16", "channels_last": True, "sms": 132}
    assert calls == [(real.float16, real.float16, True, 4)] * 4
    check(kernels.kernel_table(path, 4))
    assert {event["cat"] for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]} == {"kernel"}


# Meters beside a load, whose process is a stand-in


@contextlib.contextmanager
def no_mps():
    yield {}


def loading(monkeypatch, script):
    """Let `meters` start this script in place of a load, and NVML be the stand-in."""
    monkeypatch.syspath_prepend(str(FAKES))
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    asked = []
    begin = probe.subprocess.Popen

    def popen(command, **options):
        asked.append(json.loads(command[-1]))
        return begin([sys.executable, "-c", script], **options)

    monkeypatch.setattr(probe, "alone", no_mps)
    monkeypatch.setattr(probe.subprocess, "Popen", popen)
    return asked


SPIN = """import json, time; b = time.monotonic(); print(json.dumps({"begin": b}), flush=True)
time.sleep(0.6); print(json.dumps({"sms": 66, "seen": 66, "begin": b, "end": time.monotonic()}))"""


def test_meters_are_read_while_the_load_runs(monkeypatch):
    asked = loading(monkeypatch, SPIN)
    monkeypatch.setattr(meters, "LOAD_S", 0.2)
    found = meters.under_load(66)
    assert asked == [{"lease_sms": 66, "seconds": 2.2}]
    assert (found["sm"], found["occupancy"], found["dram"], found["inside"]) == (60, 25, None, True)
    assert found["watts"] == pytest.approx(350, rel=0.02)
    assert found["spin"]["seen"] == 66
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("import json; print(json.dumps({'error': 'GreenError: no such groups'}))", "GreenError: no such groups"),
        ("import sys; sys.exit('no torch here')", "the child ended: no torch here"),
        ("import time; time.sleep(60)", r"the child did not begin within 0\.3 s"),
    ],
)
def test_a_load_that_does_not_begin_says_why(monkeypatch, script, words):
    loading(monkeypatch, script)
    monkeypatch.setattr(probe.begun, "__defaults__", (0.3 if "sleep" in script else 30.0,))
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match=words):
        meters.under_load(0)
    assert time.monotonic() - begin < 30
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)


def test_meters_are_read_at_rest_on_half_of_the_sms_and_on_all(monkeypatch):
    monkeypatch.syspath_prepend(str(FAKES))
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    names = [step.name for step in meters.steps(Target("gpu"))]
    assert names == ["gpm idle", "gpm 66 SMs", "gpm all SMs"]
    assert [step.name for step in meters.steps(Target("mps"))] == ["gpm idle", "gpm all SMs"]
    monkeypatch.setattr(meters, "LOAD_S", 0.15)
    found = meters.idle()
    assert (found["sm"], found["tensor"]) == (60, 0)
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
