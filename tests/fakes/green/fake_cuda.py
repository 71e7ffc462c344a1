"""A driver module in plain Python, and a network that sleeps: green contexts without cuda-bindings or a GPU."""

from __future__ import annotations

import time
from enum import IntEnum
from types import SimpleNamespace

from dstack_lab.devices.green_backend import GreenBackend
from dstack_lab.devices.green_ledger import SmLedger


class CUresult(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_INVALID_DEVICE = 101
    CUDA_ERROR_NOT_SUPPORTED = 801


class FakeCuda:
    """The functions of ``cuda.bindings.driver`` that green contexts need, on a GPU of `sms` SMs.

    Parameters
    ----------
    sms : int
    groups : int
        Most groups of `step` SMs that the split yields.
    step : int
    fail : dict
        Function -> status it answers.
    """

    CUdevResourceType = SimpleNamespace(CU_DEV_RESOURCE_TYPE_SM=1)

    def __init__(self, sms=132, groups=15, step=8, fail=None, version=13000):
        self.sms, self.most, self.step, self.fail, self.version = sms, groups, step, fail or {}, version
        self.calls = []

    def _answer(self, name, *values):
        self.calls.append(name)
        return (self.fail.get(name, CUresult.CUDA_SUCCESS), *values)

    def _resource(self, sms, parts=()):
        return SimpleNamespace(
            sm=SimpleNamespace(smCount=sms, minSmPartitionSize=self.step, smCoscheduledAlignment=self.step), parts=parts
        )

    def cuInit(self, flags):
        return self._answer("cuInit")

    def cuDriverGetVersion(self):
        return self._answer("cuDriverGetVersion", self.version)

    def cuDeviceGet(self, number):
        if number:
            return CUresult.CUDA_ERROR_INVALID_DEVICE, None
        return self._answer("cuDeviceGet", number)

    def cuDeviceGetName(self, length, device):
        return self._answer("cuDeviceGetName", b"Fake GPU\0\0")

    def cuDevicePrimaryCtxRetain(self, device):
        return self._answer("cuDevicePrimaryCtxRetain", 1)

    def cuDeviceGetDevResource(self, device, kind):
        return self._answer("cuDeviceGetDevResource", self._resource(self.sms, range(self.sms)))

    def cuDevSmResourceSplitByCount(self, number, whole, flags, least):
        step = 2 if flags else self.step
        size = -(-least // step) * step
        most = self.sms // size if flags else min(self.most, self.sms // size)
        if number == 0:
            return self._answer("cuDevSmResourceSplitByCount", [], most, None)
        groups = [self._resource(size, range(i * size, (i + 1) * size)) for i in range(most)]
        groups += [self._resource(0)] * (number - most)  # the list is as long as was asked for
        used = size * most
        rest = self._resource(self.sms - used, range(used, self.sms))
        return self._answer("cuDevSmResourceSplitByCount", groups, most, rest)

    def cuDevResourceGenerateDesc(self, resources, number):
        return self._answer("cuDevResourceGenerateDesc", [sm for resource in resources for sm in resource.parts])

    def cuGreenCtxCreate(self, description, device, flags):
        assert flags == 1
        return self._answer("cuGreenCtxCreate", description)

    def cuGreenCtxStreamCreate(self, green, flags, priority):
        assert flags == 1
        return self._answer("cuGreenCtxStreamCreate", 7)

    def cuGreenCtxGetDevResource(self, green, kind):
        return self._answer("cuGreenCtxGetDevResource", self._resource(len(green)))


class Sleeper(GreenBackend):
    """A backend whose networks are called after what they do: ``sleep-5`` serves a batch in 5 ms."""

    def __init__(self, options):
        super().__init__(options)

    def load(self):
        if self.options.model == "unknown":
            raise ValueError("network = 'unknown': must be one of sleep-5")
        self.ledger = SmLedger.of(self.options.device, self.options.fine, FakeCuda())
        return {"groups": self.ledger.groups, "granted_sms": self.ledger.context(self.groups).sms}

    def run(self, inputs):
        self.path = "graph" if self.options.graphs and self.groups in self.homes else "eager"
        with self.hold():
            kind, _, number = self.options.model.rpartition(":")[2].partition("-")
            if (kind == "oom" and len(inputs) > 1) or (kind == "glutton" and 3 in inputs):
                raise MemoryError("CUDA out of memory")
            if kind == "fault" and len(inputs) > 1:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            time.sleep(float(number) / 1000)
        return [[i, 0.5] for i in inputs]
