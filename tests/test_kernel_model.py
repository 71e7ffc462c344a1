"""The GPU% model from kernels: closed forms, physical limits, monotone everywhere, public measurements."""

import dataclasses
import runpy
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dstack_lab import zoo
from dstack_lab.chrome_trace import from_trace
from dstack_lab.files import data_folder
from dstack_lab.gpu_specs import A100, H200, P100, SPECS, T4, V100
from dstack_lab.kernel_cost import CALIBRATIONS, HALF_RATE_WARPS, Calibration
from dstack_lab.kernel_model import RECORDED, KernelModel, simulated_profile, write_simulated_profiles
from dstack_lab.kernels import of_module
from dstack_lab.profiles import load_profile

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "accuracy_kernels.py"
PLAIN = Calibration(kernel_us=5, bandwidth_efficiency=0.8, saturating_share=0.5, fp32_efficiency=0.9, winograd_gain=2)


@lru_cache
def kernels(name):
    network = zoo.load(name, device="meta")
    return of_module(network.module, network.example, name)


def one(module, *shape, **options):
    return KernelModel(of_module(module, torch.empty(*shape, device="meta")), V100, calibration=PLAIN, **options)


def test_an_element_wise_kernel_takes_its_bytes_over_the_bandwidth():
    model = one(nn.ReLU(), 1, 1_000_000)
    moved = 2 * 4 * 8_000_000
    assert model.predict(8, 100) == pytest.approx(5e-3 + moved / (900e9 * 0.8) * 1e3)
    assert model.predict(8, 50) == model.predict(8, 100)  # half the SMs still pull everything
    assert model.predict(8, 25) - 5e-3 == pytest.approx(2 * (model.predict(8, 100) - 5e-3))


def test_half_precision_moves_half_the_bytes():
    full, half = (one(nn.ReLU(), 1, 10_000_000, precision=p).predict(4, 100) - 5e-3 for p in ("fp32", "fp16"))
    assert half == pytest.approx(full / 2)
    already = KernelModel(of_module(nn.Sequential(nn.Linear(8, 8), nn.ReLU()).half(), torch.zeros(1, 8).half()), V100)
    assert already.kernels.item_bytes == 2


def test_a_convolution_s_time_is_work_per_tile_times_waves():
    # 40 * 20 * 20 results of 128 channels in 125 tiles of 128 x 128, each 2 * 128 * 128 * 64 operations
    model = one(nn.Conv2d(64, 128, 1, bias=False), 40, 64, 20, 20)
    rate = 15.7e12 / 80 * 0.9
    for sms, per_sm in ((8, 16), (42, 3), (64, 2), (80, 2)):
        tile = 2 * 128 * 128 * 64 / rate * (per_sm + HALF_RATE_WARPS / 8 * max(1, per_sm / 2))
        bound = model.kernel_ms(40, sms * 100 / 80)[0, 0]
        assert bound <= tile * 1e3 + 5e-3 + 1e-9  # no tile does better than the best one
        ideal = 2 * 16000 * 128 * 64 / (rate * sms)
        assert bound >= ideal * 1e3


def test_waves_make_steps():
    # 20 tiles at most whatever the share: between 10 and 18 SMs each still does two
    model = one(nn.Conv2d(512, 64, 1, bias=False), 1, 512, 16, 80)
    shares = np.arange(2, 81, 2) * 100 / 80
    times = model.kernel_ms(1, shares)[0]
    assert len(np.unique(times.round(9))) < len(times) / 2
    assert times[0] > 4 * times[-1]


def test_no_prediction_beats_the_data_sheet():
    for gpu in (V100, A100, H200):
        for name in ("resnet50", "bert_base", "mobilenet_v2"):
            table = kernels(name).at(16)
            model = KernelModel(kernels(name), gpu, precision="fp32")
            least_flops = table["flops"].sum() / 2.25 / (gpu.fp32_tflops * 1e12)  # Winograd saves at most 2.25
            least_bytes = (table["read_bytes"] + table["written_bytes"]).sum() / (gpu.bandwidth_gb_s * 1e9)
            assert model.predict(16, 100) > 1e3 * max(least_flops, least_bytes)


@settings(deadline=None)  # the first look at a network traces it
@given(
    name=st.sampled_from(("resnet50", "mobilenet_v2", "bert_base", "alexnet")),
    gpu=st.sampled_from(sorted(SPECS)),
    batches=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    shares=st.tuples(st.floats(1, 100), st.floats(1, 100)),
    graphs=st.booleans(),
)
def test_never_slower_with_more_gpu_nor_faster_with_a_larger_batch(name, gpu, batches, shares, graphs):
    model = KernelModel(kernels(name), SPECS[gpu], graphs=graphs)
    small, large = sorted(batches)
    low, high = sorted(shares)
    ms = model.predict([[small], [large]], [[low, high]])
    assert (ms > 0).all()
    assert (ms[:, 0] >= ms[:, 1] * (1 - 1e-12)).all()
    assert (ms[0] <= ms[1] * (1 + 1e-12)).all()


@pytest.mark.parametrize("name", zoo.names())
def test_every_network_of_the_zoo_is_monotone_on_a_fine_grid(name):
    ms = KernelModel(kernels(name), V100).predict(np.arange(1, 41)[:, None], np.arange(1, 101)[None, :])
    assert (np.diff(ms, axis=0) >= -1e-12).all()
    assert (np.diff(ms, axis=1) <= 1e-12).all()


def test_scalars_give_a_float_and_arrays_their_common_shape():
    model = KernelModel(kernels("alexnet"), V100)
    assert isinstance(model.predict(1, 100), float)
    grid = model.predict(np.array([1, 8])[:, None], [20, 50, 100])
    assert grid.shape == (2, 3)
    assert grid[1, 2] == pytest.approx(model.predict(8, 100))


def test_the_host_sets_a_floor_without_graphs():
    fast = dataclasses.replace(PLAIN, kernel_us=1, launch_us=8)
    with_graph, without = (KernelModel(kernels("mobilenet_v2"), H200, graphs=g, calibration=fast) for g in (True, False))
    floor = (len(kernels("mobilenet_v2")) + 1) * 8e-3
    assert with_graph.predict(1, 100) < floor
    assert without.predict(1, 100) == pytest.approx(floor)
    assert without.predict(64, 10) == pytest.approx(with_graph.predict(64, 10) + 8e-3)  # the GPU is the slower one


def test_a_breakdown_adds_up_and_names_what_binds():
    model = KernelModel(kernels("vgg19"), V100)
    table = model.breakdown(8, 40)
    assert table["service_ms"].sum() == pytest.approx(model.predict(8, 40))
    assert set(table["bound"]) <= {"compute", "memory", "launch"}
    assert table.loc[table["kind"] == "conv", "bound"].iloc[5] == "compute"
    assert table.loc[table["operator"] == "max_pool2d_with_indices", "bound"].iloc[0] == "memory"
    assert (table["units"] >= 1).all()


def test_a_kernel_s_knee_is_where_its_blocks_fit():
    tiny = one(nn.Linear(64, 32), 1, 64)
    assert tiny.kernel_knees_pct(1)[0] == 2.5  # one block: one pair of 80 SMs
    huge = one(nn.Linear(2048, 4096), 512, 2048)
    assert huge.kernel_knees_pct(512)[0] > 80
    model = KernelModel(kernels("resnet50"), V100)
    knees = model.kernel_knees_pct(4)
    at_knee = np.array([model.kernel_ms(4, knee)[i, 0] for i, knee in enumerate(knees)])
    assert (at_knee <= 1.05 * model.kernel_ms(4, 100)[:, 0] + 1e-12).all()


def test_batch_moves_the_network_s_knee_right():
    model = KernelModel(kernels("resnet50"), V100)
    shares = np.arange(10, 101, 10)
    first = [shares[np.argmax(ms <= 1.05 * ms[-1])] for ms in model.predict(np.array([[1], [8], [64]]), shares)]
    assert first == sorted(first)
    assert first[0] < first[-1]


def test_precision_of_pytorch_is_tf32_in_convolutions_only():
    assert KernelModel(kernels("vgg19"), A100).predict(32, 100) < 0.6 * KernelModel(kernels("vgg19"), A100, "fp32").predict(
        32, 100
    )
    assert KernelModel(kernels("bert_base"), A100).predict(32, 100) == pytest.approx(
        KernelModel(kernels("bert_base"), A100, "fp32").predict(32, 100)
    )
    assert KernelModel(kernels("vgg19"), V100).predict(8, 50) == KernelModel(kernels("vgg19"), V100, "fp32").predict(8, 50)


def test_faster_gpus_are_faster():
    slow_to_fast = [KernelModel(kernels("resnet50"), gpu).predict(32, 100) for gpu in (T4, P100, V100, A100, H200)]
    assert slow_to_fast == sorted(slow_to_fast, reverse=True)


def test_measured_kernels_keep_their_time_and_scale_by_waves():
    def event(ts, dur, grid):
        return {"cat": "kernel", "name": "k", "ts": ts, "dur": dur, "args": {"grid": [grid, 1, 1], "block": [256, 1, 1]}}

    trace = {"traceEvents": [event(0, 100, 160), event(105, 40, 20)]}
    model = KernelModel(from_trace(trace, batch=2), V100)
    assert model.predict(2, 100) == pytest.approx(0.145)
    assert model.predict(2, 50) == pytest.approx((200 + 5 + 40) / 1e3)  # 160 blocks: 4 for each SM instead of 2
    assert model.predict(2, 10) == pytest.approx((1000 + 5 + 120) / 1e3)
    with pytest.raises(ValueError, match="batch = 1: must be 2"):
        model.predict(1, 100)
    with pytest.raises(ValueError, match=r"gpu\.sms = 80: must be 132, as the GPU that was traced"):
        KernelModel(from_trace({**trace, "deviceProperties": [{"numSms": 132}]}, batch=2), V100)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kernels": "resnet50"}, "kernels = 'str'"),
        ({"gpu": "V100"}, "gpu = 'str'"),
        ({"precision": "int8"}, "precision = 'int8': must be one of"),
        ({"precision": "tf32"}, "which has no TF32"),
        ({"calibration": 0.5}, "calibration = 'float'"),
    ],
)
def test_wrong_arguments_are_named(change, says):
    with pytest.raises(ValueError, match=says):
        KernelModel(**{"kernels": kernels("alexnet"), "gpu": V100, **change})


@pytest.mark.parametrize(
    ("batch", "share", "says"),
    [(0, 50, "batch = 0"), (0.5, 50, "batch = 0.5"), (float("nan"), 50, "batch = nan"), (1, 0, "gpu_pct"), (1, 101, "gpu_pct")],
)
def test_a_point_outside_the_range_is_refused(batch, share, says):
    with pytest.raises(ValueError, match=says):
        KernelModel(kernels("alexnet"), V100).predict(batch, share)


def test_a_constant_must_be_positive():
    with pytest.raises(ValueError, match=r"calibration\.kernel_us = 0"):
        Calibration(kernel_us=0)
    assert KernelModel(kernels("alexnet"), dataclasses.replace(H200, name="NVIDIA H200")).calibration == CALIBRATIONS["H200"]
    assert KernelModel(kernels("alexnet"), dataclasses.replace(H200, name="B300")).calibration == Calibration()


def test_between_whole_batches_lies_between_their_times():
    model = KernelModel(kernels("alexnet"), V100)
    assert model.predict(2.5, 50) == pytest.approx((model.predict(2, 50) + model.predict(3, 50)) / 2)
    assert model.predict([1.0, 4.0], 50).tolist() == model.predict([1, 4], 50).tolist()


def test_eager_execution_is_never_faster():
    grid = {"models": ["mobilenet_v2"], "batches": (1, 16), "shares": (20, 100)}
    eager = simulated_profile(H200, **grid, fused=False, graphs=False).table["service_ms"]
    assert (eager > simulated_profile(H200, **grid).table["service_ms"]).all()


def test_a_simulated_profile_says_so_and_takes_networks_of_one_s_own():
    own = zoo.from_module(nn.Linear(16, 4), torch.zeros(1, 16), "mine")
    profile = simulated_profile(H200, ["alexnet", own], batches=(1, 4), shares=(50, 100))
    assert profile.models == ("alexnet", "mine")
    assert profile.strict
    assert profile.provenance.kind == "simulated"
    assert profile.provenance.device == "H200-like, 132 SMs, FP32, convolutions in TF32"
    assert profile.provenance.mechanism == "model"
    assert "torch" in profile.provenance.versions
    assert all(ms == float(f"{ms:.4g}") for ms in profile.table["service_ms"])
    for empty in ({"models": []}, {"batches": ()}, {"shares": ()}):
        with pytest.raises(ValueError, match="1 or more"):
            simulated_profile(H200, **{"models": ["alexnet"], **empty})


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_profiles_are_what_the_model_says(name):
    recorded = load_profile(f"{name}-simulated")
    assert recorded.models == tuple(sorted(zoo.names()))
    again = simulated_profile(SPECS[name], ["squeezenet1_1"]).of("squeezenet1_1")
    rows = recorded.of("squeezenet1_1")
    assert (rows[["batch", "gpu_pct"]] == again[["batch", "gpu_pct"]]).all().all()
    assert rows["service_ms"].to_numpy() == pytest.approx(again["service_ms"].to_numpy(), rel=1e-3)


def test_profiles_are_written_where_asked(tmp_path, monkeypatch):
    monkeypatch.setattr("dstack_lab.kernel_model.RECORDED", ("t4",))
    monkeypatch.setattr(zoo, "names", lambda: ("alexnet",))
    (path,) = write_simulated_profiles(tmp_path)
    assert path == tmp_path / "t4-simulated.csv"
    assert load_profile(path).models == ("alexnet",)
    assert data_folder().joinpath("profiles", "t4-simulated.csv").is_file()


def test_public_v100_measurements_are_met():
    benchmark = runpy.run_path(str(BENCHMARK))
    if not (benchmark["DATA"] / "v100_gslice_authors.csv").is_file():
        pytest.skip("the public measurements are not here")
    table = benchmark["results"](benchmark["DATA"])
    assert list(table.loc[~table["reached"], "figure"]) == []


def test_the_benchmark_skips_with_a_sentence(tmp_path, capsys):
    assert runpy.run_path(str(BENCHMARK))["main"](["--data", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("skipped: no v100_gslice_authors.csv")
