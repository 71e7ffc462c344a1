"""The table of kernels, from a trace written by hand, and the item that needs a GPU."""

from __future__ import annotations

import gzip
import json
import os
import zipfile

import numpy as np
import pandas as pd
import pytest
from test_agenda import FAKES, NO_GPU, record

import dstack_lab as lab
from dstack_lab.agenda import kernels, perform
from dstack_lab.agenda.target import Target
from dstack_lab.chrome_trace import from_trace
from dstack_lab.kernel_model import KernelModel


def kernel(name, ts, dur, grid, block, **more):
    args = {"grid": grid, "block": block, "device": 0, "stream": 7, **more}
    return {"ph": "X", "cat": "kernel", "name": name, "ts": ts, "dur": dur, "pid": 0, "tid": 7, "args": args}


#: As Kineto writes it: the host's operators among the kernels, not in order of time.
TRACE = {
    "schemaVersion": 1,
    "deviceProperties": [
        {
            **{"id": 0, "name": "NVIDIA H200", "numSms": 132, "maxThreadsPerMultiprocessor": 2048},
            **{"regsPerMultiprocessor": 65536, "sharedMemPerMultiprocessor": 233472},
        }
    ],
    "traceEvents": [
        {"ph": "X", "cat": "cpu_op", "name": "aten::conv2d", "ts": 90, "dur": 30},
        {"ph": "X", "cat": "gpu_memcpy", "name": "Memcpy HtoD", "ts": 95, "dur": 2, "args": {"bytes": 4}},
        kernel("relu", 131.0, 4.5, [98, 1, 1], [128, 1, 1], **{"registers per thread": 16, "shared memory": 0}),
        kernel("gemm", 100.0, 28.0, [49, 8, 2], [16, 16, 1], **{"registers per thread": 122, "shared memory": 73728}),
        kernel("pool", 140.0, 2.0, [7, 1, 1], [64, 1, 1]),
    ],
}


def check(table):
    assert table["name"].tolist() == ["gemm", "relu", "pool"]
    assert table["us"].tolist() == [28, 4.5, 2]
    assert table["gap_us"].tolist() == [0, 3, 4.5]
    assert table["grid"].tolist() == ["49x8x2", "98x1x1", "7x1x1"]
    assert table["block"].tolist() == ["16x16x1", "128x1x1", "64x1x1"]
    assert table["blocks"].tolist() == [784, 98, 7]
    assert table["threads"].tolist() == [256, 128, 64]
    assert table["resident"].tolist() == [2, 16, 32]  # by registers 65536 // (122 * 256); by threads; by blocks
    assert table["waves"].to_numpy() == pytest.approx([784 / 264, 98 / (16 * 132), 7 / (32 * 132)])
    np.testing.assert_array_equal(table["regs"], [122, 16, np.nan])
    np.testing.assert_array_equal(table["smem"], [73728, 0, np.nan])


def test_a_trace_becomes_a_table_of_kernels(tmp_path):
    check(kernels.kernel_table(TRACE, 4))
    path = tmp_path / "net.json.gz"
    path.write_bytes(gzip.compress(json.dumps(kernels.slim(TRACE)).encode()))
    check(kernels.kernel_table(path, 4))


def test_without_the_number_of_sms_there_are_no_waves():
    assert kernels.kernel_table({"traceEvents": TRACE["traceEvents"]}, 4)["waves"].isna().all()


def test_a_slim_trace_feeds_the_model_like_the_whole_one():
    gpu = lab.gpu_specs.H200
    whole, slim = (KernelModel(from_trace(t, 4, "net"), gpu) for t in (TRACE, kernels.slim(TRACE)))
    for share in (5, 20, 100):
        assert whole.predict(4, share) == slim.predict(4, share) > 0
    with pytest.raises(RuntimeError, match="no kernel records: CUPTI"):
        kernels.slim({"traceEvents": TRACE["traceEvents"][:2]})


def test_on_a_cpu_the_item_says_that_kernels_need_a_gpu(tmp_path):
    with pytest.raises(RuntimeError, match=r"kernels need a GPU: .* pass --device gpu"):
        perform("kernels", tmp_path, "cpu")


def test_each_trace_is_kept_and_becomes_rows(tmp_path, monkeypatch):
    """The child that traces is replaced by one that writes the trace of above."""

    def child(what, model, batch, path):
        if model == "vgg19":
            raise RuntimeError("out of memory")
        with open(path, "wb") as out:
            out.write(gzip.compress(json.dumps(kernels.slim(TRACE)).encode()))
        return {"sms": 132}

    monkeypatch.setattr(kernels, "child", child)
    kept = record(tmp_path)
    kernels.run(Target("gpu", quick=True), kept)
    assert kept.names("done") == ["resnet50, batch 1", "resnet50, batch 16"]
    assert kept.names("failed") == ["vgg19, batch 1", "vgg19, batch 16"]
    assert kept.value("resnet50, batch 1") == {"sms": 132, "kernels": 3, "busy_us": 34.5, "idle_us": 7.5}
    with zipfile.ZipFile(kept.folder / "h200-traces.zip") as traces:
        assert traces.namelist() == ["resnet50-b1.json.gz", "resnet50-b16.json.gz"]
        check(kernels.kernel_table(json.loads(gzip.decompress(traces.read("resnet50-b1.json.gz"))), 1))
    assert len(list(kept.folder.iterdir())) == 3  # with the tables and the record: few files travel
    table = pd.read_csv(kept.table_path("kernels"))
    for batch in kernels.BATCHES:
        check(table[table["batch"] == batch].reset_index(drop=True))


def test_a_child_without_cuda_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{FAKES}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(RuntimeError, match=NO_GPU):
        kernels.child("trace", dict(os.environ), model="alexnet", batch=1, path=str(tmp_path / "x.gz"))
    assert not (tmp_path / "x.gz").exists()
