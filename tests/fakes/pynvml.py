"""Stand-in for NVML: the GPUs of $FAKE_GPUS, a JSON list of what each call answers; "absent" without a driver."""

import json
import os
import time
from types import SimpleNamespace

NVML_CLOCK_SM = 1
H200 = {
    "Name": "NVIDIA H200",
    "UUID": "GPU-aaaa",
    "NumGpuCores": 16896,
    "CudaComputeCapability": [9, 0],
    "MigMode": [0, 0],
    "ComputeMode": 0,
    "ClockInfo": 1980,
    "PowerUsage": 350000,
    "CurrentClocksEventReasons": 0,
    "memory": 143771 << 20,
    "gpm": 1,
    "pids": [],
}


class NVMLError(Exception):
    pass


class NVMLError_LibraryNotFound(NVMLError):
    pass


class NVMLError_DriverNotLoaded(NVMLError):
    pass


class NVMLError_NoPermission(NVMLError):
    pass


def _gpus():
    return [H200 | gpu for gpu in json.loads(os.environ.get("FAKE_GPUS", "[{}]"))]


def nvmlInit():
    error = {"absent": NVMLError_LibraryNotFound, "unloaded": NVMLError_DriverNotLoaded, "forbidden": NVMLError_NoPermission}
    if (mood := os.environ.get("FAKE_DRIVER", "ok")) != "ok":
        raise error.get(mood, NVMLError)(mood)


def nvmlShutdown():
    pass


def nvmlSystemGetDriverVersion():
    return "580.159"


def nvmlSystemGetCudaDriverVersion():
    return int(os.environ.get("FAKE_CUDA", "13000"))


def nvmlDeviceGetCount():
    return len(_gpus())


def nvmlDeviceGetHandleByIndex(index):
    gpu = _gpus()[index]
    if gpu.get("forbidden"):
        raise NVMLError_NoPermission("no")
    return gpu


def nvmlDeviceGetMemoryInfo(gpu):
    return SimpleNamespace(total=gpu["memory"], used=gpu["memory"] // 2)


def nvmlDeviceGetTotalEnergyConsumption(gpu):
    return int(gpu["PowerUsage"] * time.monotonic())  # mJ of a GPU that draws the same power all the time


NVML_GPM_METRICS_GET_VERSION = 1


def nvmlGpmSampleAlloc():
    return SimpleNamespace(at=None)


def nvmlGpmSampleFree(sample):
    assert sample.at is not None


def nvmlGpmSampleGet(gpu, sample):
    sample.at = time.monotonic()


def c_nvmlGpmMetricsGet_t():
    return SimpleNamespace(metrics=[SimpleNamespace() for _ in range(8)])


def nvmlGpmMetricsGet(asked):
    assert asked.sample2.at - asked.sample1.at > 0.1  # nvml.h
    for metric in asked.metrics[: asked.numMetrics]:
        metric.nvmlReturn = 3 if metric.metricId == 10 else 0  # DRAM: not supported
        metric.value = {2: 60.0, 3: 25.0}.get(metric.metricId, 0.0)


def nvmlGpmQueryDeviceSupport(gpu):
    return SimpleNamespace(isSupportedDevice=gpu["gpm"])


def nvmlDeviceGetComputeRunningProcesses(gpu):
    return [SimpleNamespace(pid=pid) for pid in gpu["pids"]]


def _told(key):
    def call(gpu, *_):
        if gpu[key] is None:
            raise NVMLError("Not Supported")
        return gpu[key]

    return call


for _key in H200:
    if _key[0].isupper():
        globals()[f"nvmlDeviceGet{_key}"] = _told(_key)
