"""What the GPU did during a run, read a few times a second by a thread of the parent: NVML starts no CUDA."""

from __future__ import annotations

import contextlib
import threading
import time
from types import TracebackType
from typing import Any, Self

from dstack_lab.devices import nvml

#: GPM counts between two reads, which must lie more than 100 ms apart (nvml.h).
PERIOD_S = 0.2

#: Columns of `Trace.samples` -> NVML's numbers of GPM metrics [%].
GPM_METRICS = {"sm_util_pct": 2, "sm_occupancy_pct": 3, "dram_util_pct": 10}

Sample = dict[str, float]


class Sampler:
    """Read power, energy, clock and, where there is GPM, how many SMs are busy; use as a ``with`` block.

    A value that the driver does not tell is NaN; without NVML there are no samples.

    Parameters
    ----------
    device : int
        As `nvml.gpu` counts.

    Attributes
    ----------
    samples : list of dict
        ``time_ms`` is of ``time.monotonic``; ``energy_j`` since the driver was loaded; ``sm_util_pct``,
        ``sm_occupancy_pct`` and ``dram_util_pct`` are means since the sample before.
    """

    def __init__(self, device: int) -> None:
        self.device, self.samples = device, list[Sample]()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="nvml")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join(5.0)

    def _watch(self) -> None:
        with contextlib.suppress(nvml.NoDriver, ValueError):
            wanted = nvml.gpu(self.device).uuid
            with nvml.session() as lib:
                count = nvml.told(lib, lib.nvmlDeviceGetCount) or 0
                handles = [nvml.told(lib, lib.nvmlDeviceGetHandleByIndex, i) for i in range(count)]
                handle = next(h for h in handles if str(nvml.told(lib, lib.nvmlDeviceGetUUID, h) or "") == wanted)
                gpm = _Gpm.open(lib, handle)
                while True:
                    last = self._stop.wait(PERIOD_S)  # one more at the end, so that energy covers the run
                    self.samples.append(_read(lib, handle) | (gpm.read() if gpm and not last else {}))
                    if last:
                        return


def _read(lib: Any, handle: Any) -> Sample:
    def ask(name: str, *more: Any) -> Any:
        call = getattr(lib, name, None)
        return None if call is None else nvml.told(lib, call, handle, *more)

    memory, power = ask("nvmlDeviceGetMemoryInfo"), ask("nvmlDeviceGetPowerUsage")
    energy, clock = ask("nvmlDeviceGetTotalEnergyConsumption"), ask("nvmlDeviceGetClockInfo", getattr(lib, "NVML_CLOCK_SM", 1))
    reasons = ask("nvmlDeviceGetCurrentClocksEventReasons")
    missing = float("nan")
    return {
        "time_ms": time.monotonic() * 1e3,
        "power_w": missing if power is None else power / 1e3,
        "energy_j": missing if energy is None else energy / 1e3,
        "clock_mhz": missing if clock is None else float(clock),
        "memory_mib": missing if memory is None else getattr(memory, "used", missing) / 2**20,
        "throttled": missing if reasons is None else float(any(reasons & bit for bit in nvml.THROTTLES)),
    } | dict.fromkeys(GPM_METRICS, missing)


class _Gpm:
    """SM activity on Hopper and later: device-wide, no profiler session."""

    def __init__(self, lib: Any, handle: Any) -> None:
        self.lib, self.handle = lib, handle
        self.before, self.now = lib.nvmlGpmSampleAlloc(), lib.nvmlGpmSampleAlloc()
        lib.nvmlGpmSampleGet(handle, self.before)

    @classmethod
    def open(cls, lib: Any, handle: Any) -> _Gpm | None:
        """Begin to count; None where this GPU, driver or user cannot."""
        if not getattr(nvml.told(lib, getattr(lib, "nvmlGpmQueryDeviceSupport", nvml._absent), handle), "isSupportedDevice", 0):
            return None
        return nvml.told(lib, cls, lib, handle)  # type: ignore[no-any-return]

    def read(self) -> Sample:
        """Return the means since the read before; what it does not tell is left out."""
        lib = self.lib
        try:
            lib.nvmlGpmSampleGet(self.handle, self.now)
            asked = lib.c_nvmlGpmMetricsGet_t()
            asked.version, asked.numMetrics = lib.NVML_GPM_METRICS_GET_VERSION, len(GPM_METRICS)
            asked.sample1, asked.sample2 = self.before, self.now
            for i, number in enumerate(GPM_METRICS.values()):
                asked.metrics[i].metricId = number
            lib.nvmlGpmMetricsGet(asked)
        except (lib.NVMLError, AttributeError):
            return {}
        self.before, self.now = self.now, self.before
        found = [asked.metrics[i] for i in range(len(GPM_METRICS))]
        return {name: float(m.value) for name, m in zip(GPM_METRICS, found, strict=True) if m.nvmlReturn == 0}
