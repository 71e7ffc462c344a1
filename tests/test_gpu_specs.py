"""GPU data: the figures agree with each other, and a driver's answers become a spec."""

import dataclasses
import math
import sys
import types

import numpy as np
import pytest

from dstack_lab.gpu_specs import A100, H100, H200, P100, SPECS, T4, V100, GpuSpec

#: FP32 cores of an SM; FP16 operations of an SM in a clock.
CORES = {"P100": 64, "V100": 64, "T4": 64, "A100": 64, "H100": 128, "H200": 128}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_fp32_rate_is_cores_times_clock(spec):
    assert spec.fp32_tflops == pytest.approx(2 * CORES[spec.name] * spec.sms * spec.clock_mhz * 1e6 / 1e12, rel=0.02)


def test_known_relations_between_gpus():
    assert set(SPECS) == {"v100", "p100", "t4", "a100", "h100", "h200"}
    assert A100.tf32_tflops * 2 == A100.fp16_tflops
    assert H100.tf32_tflops * 2 == H100.fp16_tflops
    assert P100.fp16_tflops == 2 * P100.fp32_tflops  # no tensor cores
    assert (H200.sms, H200.fp16_tflops) == (H100.sms, H100.fp16_tflops)
    assert H200.bandwidth_gb_s > H100.bandwidth_gb_s
    assert (T4.sm_threads, T4.sm_blocks) == (1024, 16)


def test_rates_by_precision():
    assert A100.tflops("tf32") == 156
    assert V100.tflops("fp32") == 15.7
    with pytest.raises(ValueError, match="which has no TF32"):
        V100.tflops("tf32")
    with pytest.raises(ValueError, match="precision = 'int8': must be one of"):
        V100.tflops("int8")


def test_sms_of_a_share():
    assert V100.sms_at(100) == 80
    assert list(V100.sms_at([1, 2, 4, 6, 10, 25, 99])) == [2, 2, 4, 6, 8, 20, 80]  # pairs, rounded up
    assert list(H200.sms_at([1, 5, 10, 50, 99.9, 100])) == [2, 6, 12, 66, 130, 132]  # pairs, rounded down
    odd = dataclasses.replace(H200, sms=7, sm_step=2)
    assert list(odd.sms_at([20, 60, 99, 100])) == [2, 4, 6, 7]
    for bad in (0, 101, np.nan, [50, -1]):
        with pytest.raises(ValueError, match=r"gpu_pct = .*: must be a GPU% from 1 to 100"):
            V100.sms_at(bad)


@pytest.mark.parametrize(
    ("field", "value"),
    [("name", ""), ("sms", 0), ("sms", 1.5), ("clock_mhz", -1), ("bandwidth_gb_s", math.inf), ("l2_mib", -1), ("tf32_tflops", 0)],
)
def test_a_wrong_figure_is_refused(field, value):
    with pytest.raises(ValueError, match=f"gpu.{field} = "):
        dataclasses.replace(V100, **{field: value})


def stub_gpu(monkeypatch, capability=(9, 0), fail=None):
    """Stand in for torch and NVML with an H200's answers."""
    import torch

    properties = types.SimpleNamespace(
        name="NVIDIA H200",
        multi_processor_count=132,
        L2_cache_size=50 * 2**20,
        total_memory=139 * 2**30,
        max_threads_per_multi_processor=2048,
        major=capability[0],
        minor=capability[1],
        uuid="4f2c",
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)

    class NVMLError(Exception):
        pass

    def answer(what, value):
        def ask(*args):
            if fail == what:
                raise NVMLError("not supported")
            return value

        return ask

    asked = []
    nvml = types.ModuleType("pynvml")
    nvml.NVMLError, nvml.NVML_CLOCK_SM, nvml.NVML_CLOCK_MEM = NVMLError, 1, 2
    nvml.nvmlInit, nvml.nvmlShutdown = answer("init", None), lambda: asked.append("shutdown")
    nvml.nvmlDeviceGetHandleByUUID = lambda uuid: asked.append(uuid) or "handle"
    nvml.nvmlDeviceGetMaxClockInfo = lambda handle, kind: answer("clock", 1980 if kind == 1 else 3201)()
    nvml.nvmlDeviceGetMemoryBusWidth = answer("width", 6144)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    return asked


def test_a_driver_s_answers_become_a_spec_near_the_data_sheet(monkeypatch):
    asked = stub_gpu(monkeypatch)
    spec = GpuSpec.from_device()
    assert asked == ["GPU-4f2c", "shutdown"]
    assert (spec.name, spec.sms, spec.l2_mib, spec.memory_gib, spec.sm_blocks) == ("NVIDIA H200", 132, 50, 139, 32)
    for field in ("fp32_tflops", "tf32_tflops", "fp16_tflops", "bandwidth_gb_s"):
        assert getattr(spec, field) == pytest.approx(getattr(H200, field), rel=0.1)


def test_an_unknown_newer_gpu_counts_as_the_latest_known_before_it(monkeypatch):
    stub_gpu(monkeypatch, capability=(9, 5))
    assert GpuSpec.from_device().fp32_tflops == pytest.approx(66.9, rel=0.01)


@pytest.mark.parametrize(
    ("fail", "says"), [("init", "NVML does not answer"), ("clock", "does not tell"), ("width", "does not tell")]
)
def test_a_silent_driver_is_reported(monkeypatch, fail, says):
    stub_gpu(monkeypatch, fail=fail)
    with pytest.raises(ValueError, match=says):
        GpuSpec.from_device()


def test_an_index_beyond_the_last_gpu_is_refused(monkeypatch):
    stub_gpu(monkeypatch)
    with pytest.raises(ValueError, match="index = 1: must be from 0 to 0"):
        GpuSpec.from_device(1)


def test_without_a_gpu_the_error_says_what_to_use(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"no CUDA GPU .* a data sheet such as"):
        GpuSpec.from_device()


@pytest.mark.parametrize("gpu", SPECS.values(), ids=lambda gpu: gpu.name)
def test_each_share_grants_one_step_more(gpu):
    shares = gpu.shares()
    assert shares[-1] == 100
    granted = gpu.sms_at(shares)
    assert granted.tolist() == [n for n in range(gpu.sm_step, gpu.sms + 1, gpu.sm_step) if 100 * n / gpu.sms >= 1]
