"""Kernels of networks: published FLOPs, bytes counted by hand, fusion, traces and errors."""

import gzip
import json

import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dstack_lab import zoo
from dstack_lab.chrome_trace import from_trace
from dstack_lab.kernels import of_module

#: Published multiply-adds of one input [10^9]: the papers' or torchvision's model tables.
PUBLISHED_GMAC = {
    "alexnet": 0.71,
    "bert_base": 11.2,  # 22.5 GFLOPs at 128 tokens, 2 per multiply-add
    "inception_v3": 5.71,
    "mobilenet_v2": 0.30,
    "resnet50": 4.09,
    "resnext50_32x4d": 4.23,
    "vgg19": 19.63,
    "vit_b_16": 17.56,
}


@pytest.fixture(scope="module")
def traced():
    found = {}
    for name in zoo.names():
        network = zoo.load(name, device="meta")
        found[name] = of_module(network.module, network.example, name)
    return found


def meta(*shape):
    return torch.empty(*shape, device="meta")


@pytest.mark.parametrize("name", sorted(PUBLISHED_GMAC))
def test_flops_are_the_published_ones(traced, name):
    assert traced[name].flops(1) / 2e9 == pytest.approx(PUBLISHED_GMAC[name], rel=0.02)


#: Layers that the zoo does not have: dense links, squeeze-and-excite, shifted windows, layer scale.
OTHERS = ("densenet121", "efficientnet_b0", "swin_t", "convnext_tiny", "mobilenet_v3_large")


@pytest.mark.parametrize("name", OTHERS)
def test_flops_of_networks_outside_the_zoo(name):
    models = zoo.torchvision_models()
    published = models.get_model_weights(name).DEFAULT.meta
    with torch.device("meta"):
        module = models.get_model(name, weights=None)
    found = of_module(module, meta(1, 3, 224, 224), name)
    assert found.flops(1) / 2e9 == pytest.approx(published["_ops"], rel=0.02)
    assert found.parameters == published["num_params"]


@pytest.mark.parametrize("name", [n for n in zoo.names() if n != "bert_base"])
def test_flops_and_parameters_are_torchvision_s(traced, name):
    published = zoo.torchvision_models().get_model_weights(name).DEFAULT.meta
    assert traced[name].flops(1) / 2e9 == pytest.approx(published["_ops"], rel=0.01)
    assert traced[name].parameters == published["num_params"]


def test_every_kernel_moves_something_and_offers_a_block(traced):
    for kernels in traced.values():
        table = kernels.at(1)
        assert (table[["read_bytes", "written_bytes", "units", "sms"]] >= 1).all().all()
        assert (kernels.at(8)[["flops", "written_bytes", "units"]] >= table[["flops", "written_bytes", "units"]]).all().all()


def test_another_batch_is_what_tracing_at_that_batch_finds(traced):
    from dstack_lab import fusion
    from dstack_lab.operations import record

    network = zoo.load("resnet50", device="meta")
    seen = fusion.fuse(record(network.module, network.example(7)))
    table = traced["resnet50"].at(7)
    assert [op.flops for op in seen] == pytest.approx(list(table["flops"]))
    assert [sum(op.reads.values()) for op in seen] == pytest.approx(list(table["read_bytes"]))
    assert [op.rows for op in seen] == pytest.approx(list(table["rows"]))


def test_bytes_and_shape_of_one_convolution():
    layer = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    table = of_module(layer, meta(1, 8, 32, 32)).at(4)
    row = table.iloc[0]
    assert len(table) == 1
    assert row.fused == "convolution+native_batch_norm+relu"
    assert row.read_bytes == 4 * (4 * 8 * 32 * 32 + 16 * 8 * 9)  # the input and the weights, nothing for the folded norm
    assert row.written_bytes == 4 * 4 * 16 * 32 * 32
    assert (row.rows, row.cols, row.depth, row.groups) == (4 * 32 * 32, 16, 8 * 9, 1)
    assert row.flops == 2 * 4 * 32 * 32 * 16 * 72
    assert row.units == 4 * 32 * 32 / 128
    assert row.winograd


def test_fusion_can_be_switched_off():
    layer = nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU())
    table = of_module(layer, meta(1, 8, 32, 32), fused=False).at(1)
    assert list(table["operator"]) == ["convolution", "native_batch_norm", "relu"]
    assert list(table["kind"]) == ["conv", "norm", "pointwise"]


def test_an_addition_is_fused_with_the_last_convolution_and_still_reads_the_other_input():
    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

        def forward(self, x):
            x = F.relu(x)  # read twice: it must stay a kernel of its own
            return F.relu(self.b(self.a(x)) + x)

    table = of_module(Skip(), meta(1, 8, 16, 16)).at(1)
    assert list(table["fused"]) == ["relu", "convolution", "convolution+add+relu"]
    assert table["read_bytes"].iloc[2] == 4 * (2 * 8 * 16 * 16 + 8 * 8 + 8)


def test_an_in_place_write_is_not_taken_for_the_old_value():
    class Twice(nn.Module):
        def forward(self, x):
            y = x * 2
            z = y.t().contiguous()  # of y before it changes
            y += 1
            return z + y.t()

    table = of_module(Twice(), meta(1, 6)).at(2)
    assert list(table["fused"]) == ["mul", "clone", "add_+add"]  # add_ may not join mul, which clone reads
    assert table["read_bytes"].iloc[2] == 2 * 4 * 2 * 6  # the changed y and the copy of the old one


@pytest.mark.parametrize("fused", [True, False])
def test_attention_is_one_kernel_even_in_eager_mode(fused):
    class Attend(nn.Module):
        def forward(self, q, k, v):
            return F.scaled_dot_product_attention(q, k, v)

    shapes = (meta(1, 12, 128, 64),) * 3
    table = of_module(Attend(), shapes, fused=fused).at(2)
    assert list(table["operator"]) == ["attention"]
    row = table.iloc[0]
    assert row.flops == 2 * 2 * 2 * 12 * 128 * 128 * 64
    assert row.read_bytes == 3 * row.written_bytes == 3 * 4 * 2 * 12 * 128 * 64
    assert row.units == 2 * 12 * 128 / 64


def test_attention_written_by_hand_is_merged_only_when_fusing():
    class ByHand(nn.Module):
        def forward(self, q, k, v):
            return torch.softmax(q @ k.transpose(-1, -2) / 8, -1) @ v

    shapes = (meta(1, 64, 32),) * 3
    assert list(of_module(ByHand(), shapes).at(1)["operator"]) == ["attention"]
    assert list(of_module(ByHand(), shapes, fused=False).at(1)["operator"]) == ["bmm", "div", "_softmax", "bmm"]


def test_views_cost_nothing_and_an_expanded_input_is_read_once():
    class Look(nn.Module):
        def forward(self, x):
            return x.reshape(-1, 1, 6).expand(-1, 5, 6).transpose(1, 2) + 1

    (row,) = of_module(Look(), meta(1, 6)).at(2).itertuples()
    assert row.read_bytes == 4 * 2 * 6
    assert row.written_bytes == 4 * 2 * 6 * 5


def test_what_does_not_depend_on_the_input_is_computed_beforehand():
    class Table(nn.Module):
        def forward(self, x):
            return x + torch.arange(6, device=x.device).float().sin()

    assert list(of_module(Table(), meta(1, 6)).at(1)["operator"]) == ["add"]
    assert len(of_module(Table(), meta(1, 6), fused=False).at(1)) == 4


def test_the_traced_module_stays_as_it_was():
    layer = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout())
    layer[1].eval()
    before = {n: t.clone() for n, t in layer.state_dict().items()}
    of_module(layer, torch.zeros(2, 4))
    assert layer.training
    assert layer[0].training
    assert not layer[1].training
    assert all(torch.equal(t, before[n]) and not t.is_meta for n, t in layer.state_dict().items())
    assert torch.backends.mha.get_fastpath_enabled()


class DependsOnNumbers(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x


class DependsOnCount(nn.Module):
    def forward(self, x):
        return x[x > 0]


class MixesTheBatch(nn.Module):
    def forward(self, x):
        return x @ x.T


@pytest.mark.parametrize(
    ("module", "says"),
    [
        (DependsOnNumbers(), "use from_trace, or give a measured profile"),
        (DependsOnCount(), "use from_trace, or give a measured profile"),
        (nn.Linear(5, 5), "cannot be traced"),
        (MixesTheBatch(), "linear in the batch"),
        (nn.Identity(), "must compute something"),
        ("resnet50", "a torch.nn.Module"),
    ],
)
def test_what_cannot_be_traced_says_what_to_do(module, says):
    with pytest.raises(ValueError, match=says):
        of_module(module, torch.zeros(2, 4))


@pytest.mark.parametrize("example", [None, [], torch.tensor(1.0), [1.0]])
def test_an_example_must_have_a_batch(example):
    with pytest.raises(ValueError, match=r"example = .* with the batch as first dimension"):
        of_module(nn.Identity(), example)


@pytest.mark.parametrize("batch", [0, -1, 1.5, True])
def test_a_batch_is_a_positive_integer(traced, batch):
    with pytest.raises(ValueError, match="batch = "):
        traced["alexnet"].at(batch)


def event(name, ts, dur, grid, block, **more):
    return {"ph": "X", "cat": "kernel", "name": name, "ts": ts, "dur": dur, "args": {"grid": grid, "block": block, **more}}


TRACE = {
    "traceEvents": [
        {"ph": "X", "cat": "cpu_op", "name": "aten::conv2d", "ts": 1, "dur": 3},
        event("relu", 130.5, 4.5, [98, 1, 1], [128, 1, 1]),
        event("gemm", 100.0, 28.0, [49, 2, 1], [128, 1, 1], **{"registers per thread": 122}),
    ]
}


def check_trace(kernels):
    table = kernels.at(4)
    assert list(table["operator"]) == ["gemm", "relu"]  # in order of time
    assert list(table["work_us"]) == [28.0, 4.5]
    assert list(table["gap_us"]) == [0.0, 2.5]
    assert list(table["units"]) == [98, 98]
    assert list(table["resident"]) == [4, 16]  # 65536 // (122 * 128), 2048 // 128
    assert list(table["sms"]) == [25, 7]
    assert table["flops"].isna().all()


def test_a_trace_gives_the_kernels_as_they_ran(tmp_path):
    check_trace(from_trace(TRACE, batch=4))
    (tmp_path / "net.json").write_text(json.dumps(TRACE))
    (tmp_path / "net.json.gz").write_bytes(gzip.compress(json.dumps(TRACE).encode()))
    check_trace(from_trace(tmp_path / "net.json", batch=4))
    assert from_trace(tmp_path / "net.json.gz", batch=4).name == "net"
    with pytest.raises(ValueError, match="batch = 1: must be 4"):
        from_trace(TRACE, batch=4).at(1)


def test_the_traced_device_limits_how_many_blocks_an_sm_holds():
    device = {
        "numSms": 40,
        "maxThreadsPerMultiprocessor": 1024,
        "regsPerMultiprocessor": 65536,
        "sharedMemPerMultiprocessor": 65536,
    }
    shared = {"traceEvents": [event("k", 0, 1, [80, 1, 1], [256, 1, 1], **{"shared memory": 24576})]}
    plain = {"traceEvents": [event("k", 0, 1, [80, 1, 1], [256, 1, 1])]}
    for trace, resident in ((shared, 2), (plain, 4)):
        kernels = from_trace({**trace, "deviceProperties": [device]}, batch=1)
        assert kernels.traced_sms == 40
        assert kernels.at(1)["resident"].item() == resident


def test_a_trace_of_a_cpu_holds_no_kernel(tmp_path):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        nn.Linear(4, 4)(torch.zeros(1, 4))
    profiler.export_chrome_trace(str(tmp_path / "cpu.json"))
    with pytest.raises(ValueError, match=r"kernel events in the trace = 0: .* \(activities CPU and CUDA\)"):
        from_trace(tmp_path / "cpu.json", batch=1)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({}, "a list 'traceEvents'"),
        ({"traceEvents": []}, "kernel events in the trace = 0"),
        ({"traceEvents": [event("k", 0, 0, [1, 1, 1], [1, 1, 1])]}, "dur of kernel 'k' = 0.0"),
        ({"traceEvents": [event("k", 0, 1, [0, 1, 1], [1, 1, 1])]}, "grid of kernel 'k'"),
        ({"traceEvents": [event("k", 0, 1, [1, 1, 1], None)]}, "block of kernel 'k'"),
        ({"traceEvents": [event("k", float("nan"), 1, [1, 1, 1], [1, 1, 1])]}, "ts of kernel 'k'"),
    ],
)
def test_a_damaged_trace_is_refused(content, says):
    with pytest.raises(ValueError, match=says):
        from_trace(content, batch=1)


def test_a_file_that_is_no_trace_is_refused(tmp_path):
    (tmp_path / "half.json").write_text('{"traceEvents": [')
    with pytest.raises(ValueError, match="must be readable JSON"):
        from_trace(tmp_path / "half.json", batch=1)
    with pytest.raises(ValueError, match="an existing file"):
        from_trace(tmp_path / "none.json", batch=1)


def test_tables_of_kernels_are_plain_data(traced):
    table = traced["alexnet"].at(1)
    assert isinstance(table, pd.DataFrame)
    assert len(table) == len(traced["alexnet"]) == 12
