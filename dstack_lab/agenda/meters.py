"""What NVML's meters show beside a load that is known: SM activity at rest, on half of the SMs and on all; energy."""

from __future__ import annotations

import time
from typing import Any

from dstack_lab.agenda.record import Step
from dstack_lab.agenda.target import Target
from dstack_lab.devices import nvml

#: NVML's numbers of GPM metrics, all in percent of what the GPU has.
METRICS = {"graphics": 1, "sm": 2, "occupancy": 3, "tensor": 5, "dram": 10}
LOAD_S = 2.0


def activity(seconds: float) -> dict[str, float | None]:
    """Mean GPM metrics [%] of the next `seconds`; None for one that this GPU does not have.

    Raises
    ------
    RuntimeError
        If the GPU cannot be sampled.
    """
    with nvml.session() as n:
        handle = n.nvmlDeviceGetHandleByIndex(0)
        if not n.nvmlGpmQueryDeviceSupport(handle).isSupportedDevice:
            raise RuntimeError("this GPU has no GPM: SM activity cannot be sampled")
        first, second = n.nvmlGpmSampleAlloc(), n.nvmlGpmSampleAlloc()
        try:
            n.nvmlGpmSampleGet(handle, first)
            time.sleep(seconds)
            n.nvmlGpmSampleGet(handle, second)
            asked = n.c_nvmlGpmMetricsGet_t()
            asked.version, asked.numMetrics = n.NVML_GPM_METRICS_GET_VERSION, len(METRICS)
            asked.sample1, asked.sample2 = first, second
            for i, number in enumerate(METRICS.values()):
                asked.metrics[i].metricId = number
            n.nvmlGpmMetricsGet(asked)
            got = [asked.metrics[i] for i in range(len(METRICS))]
            return {name: m.value if m.nvmlReturn == 0 else None for name, m in zip(METRICS, got, strict=True)}
        finally:
            n.nvmlGpmSampleFree(first)
            n.nvmlGpmSampleFree(second)


def _energy_mj() -> float | None:
    with nvml.session() as n:
        return nvml.told(n, n.nvmlDeviceGetTotalEnergyConsumption, n.nvmlDeviceGetHandleByIndex(0))  # type: ignore[no-any-return]


def under_load(lease_sms: int) -> dict[str, Any]:
    """GPM beside a kernel that spins on so many SMs; on all if 0."""
    from dstack_lab.agenda.probe import alone, answer, begin, begun

    with alone() as env, begin("spin", env, lease_sms=lease_sms, seconds=LOAD_S + 2) as process:
        try:
            begun(process)  # torch has started, the kernel is compiled and runs
            before, start = _energy_mj(), time.monotonic()
            seen: dict[str, Any] = dict(activity(LOAD_S))
            after, seconds = _energy_mj(), time.monotonic() - start
            seen["watts"] = None if before is None or after is None else (after - before) / 1e3 / seconds
            spun = answer(process)
        finally:
            process.kill()
    # the sampling must lie inside the time the kernels ran
    return {**seen, "spin": spun, "inside": spun["begin"] <= start and start + seconds <= spun["end"]}


def idle() -> dict[str, Any]:
    """GPM and power at rest."""
    before, start = _energy_mj(), time.monotonic()
    seen: dict[str, Any] = dict(activity(LOAD_S))
    after = _energy_mj()
    return {**seen, "watts": None if before is None or after is None else (after - before) / 1e3 / (time.monotonic() - start)}


def steps(target: Target) -> list[Step]:
    """The steps of the probe that read meters."""
    half = (nvml.gpu(0).sms or 0) // 2
    found = [Step("gpm idle", idle), Step("gpm all SMs", lambda: under_load(0), 60)]
    if half and "green" in target.mechanisms:
        found.insert(1, Step(f"gpm {half} SMs", lambda: under_load(half), 60))
    return found
