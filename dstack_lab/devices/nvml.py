"""What the driver tells about the GPUs of this machine: read only, and never a CUDA context."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dstack_lab.checks import require

#: NVML's compute modes by number.
COMPUTE_MODES = {0: "default", 1: "exclusive thread", 2: "prohibited", 3: "exclusive process"}

#: Why the clock is below what was asked for: bits of NVML's clock event reasons.
THROTTLES = {0x4: "power cap", 0x8: "hardware slowdown", 0x20: "heat", 0x40: "heat (hardware)", 0x80: "power brake"}


class NoDriver(RuntimeError):
    """NVML cannot be used here: the sentence says why, and the cure."""


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """One GPU as the driver describes it; None is what it does not tell.

    Parameters
    ----------
    index : int
        Among the GPUs that this process may use.
    name, uuid : str
    sms : int or None
        Streaming multiprocessors, from the number of cores.
    capability : tuple of int or None
        Compute capability, such as ``(9, 0)``.
    memory_mib : float or None
    compute_mode : str or None
        A value of `COMPUTE_MODES`.
    mig : bool or None
        Whether the GPU is cut into MIG instances; None also where it cannot be.
    gpm : bool or None
        Whether SM activity can be sampled.
    clock_mhz, power_w : float or None
        Of the SMs, and of the board, now.
    throttled : tuple of str
        What holds the clock down now.
    processes : tuple of int or None
        Processes that compute on it now.
    """

    index: int
    name: str
    uuid: str
    sms: int | None = None
    capability: tuple[int, int] | None = None
    memory_mib: float | None = None
    compute_mode: str | None = None
    mig: bool | None = None
    gpm: bool | None = None
    clock_mhz: float | None = None
    power_w: float | None = None
    throttled: tuple[str, ...] = ()
    processes: tuple[int, ...] | None = None


@contextmanager
def session() -> Iterator[Any]:
    """Lend the module ``pynvml``, initialised.

    Raises
    ------
    NoDriver
        If NVML or the driver is missing or refuses.
    """
    try:
        import pynvml
    except ImportError as error:
        raise NoDriver("the package nvidia-ml-py is not installed: pip install nvidia-ml-py") from error
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise NoDriver(_why(pynvml, error)) from error
    try:
        yield pynvml
    finally:
        told(pynvml, pynvml.nvmlShutdown)


def _why(pynvml: Any, error: Exception) -> str:
    """One sentence, with the cure, for an NVML that does not start."""
    if isinstance(error, pynvml.NVMLError_LibraryNotFound):
        return "no NVIDIA driver (libnvidia-ml.so.1 not found): install one, or start the container with --gpus all"
    if isinstance(error, pynvml.NVMLError_DriverNotLoaded):
        return "the NVIDIA driver is not loaded: run nvidia-smi as root once, or restart the machine"
    if isinstance(error, pynvml.NVMLError_NoPermission):
        return "no permission to use the GPU: add this user to the group of /dev/nvidia0, or run as root"
    return f"the NVIDIA driver does not answer ({error}): see what nvidia-smi says"


def told(pynvml: Any, ask: Callable[..., Any], *arguments: Any) -> Any:
    """Answer of one NVML call; None if this GPU, driver or user does not get one."""
    try:
        return ask(*arguments)
    except (pynvml.NVMLError, AttributeError):
        return None


def versions() -> tuple[str | None, tuple[int, int] | None]:
    """Version of the driver, and of the CUDA it implements.

    Raises
    ------
    NoDriver
        If NVML cannot be used.
    """
    with session() as nvml:
        driver, number = told(nvml, nvml.nvmlSystemGetDriverVersion), told(nvml, nvml.nvmlSystemGetCudaDriverVersion)
    number = number or _cuda_version()
    return driver, None if number is None else (number // 1000, number % 1000 // 10)


def _cuda_version() -> int | None:
    """What libcuda says: the one call that needs no initialisation."""
    number = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
    except (OSError, AttributeError):
        return None
    return None if failed else number.value


def gpus(environ: Mapping[str, str] = os.environ) -> tuple[GpuFacts, ...]:
    """GPUs that this process may use, in ``nvidia-smi``'s order or that of ``CUDA_VISIBLE_DEVICES``.

    Raises
    ------
    NoDriver
        If NVML cannot be used.
    """
    with session() as nvml:
        there = told(nvml, nvml.nvmlDeviceGetCount) or 0
        handles = [told(nvml, nvml.nvmlDeviceGetHandleByIndex, i) for i in range(there)]
        if None in handles:
            raise NoDriver(
                f"no permission for GPU {handles.index(None)}: add this user to the group of /dev/nvidia*, or run as root"
            )
        uuids = [str(told(nvml, nvml.nvmlDeviceGetUUID, handle) or "") for handle in handles]
        order = visible(uuids, environ.get("CUDA_VISIBLE_DEVICES"))
        return tuple(_read(nvml, handles[i], uuids[i], at) for at, i in enumerate(order))


def visible(uuids: list[str], setting: str | None) -> list[int]:
    """Positions of the GPUs that ``CUDA_VISIBLE_DEVICES`` lets through; like CUDA, ends at the first that is wrong."""
    if setting is None:
        return list(range(len(uuids)))
    found: list[int] = []
    for entry in filter(None, map(str.strip, setting.split(","))):
        if entry.isdigit():
            matches = [int(entry)] if int(entry) < len(uuids) else []
        else:
            matches = [i for i, uuid in enumerate(uuids) if uuid.startswith(entry)]
        if len(matches) != 1:
            break
        found += matches
    return found


def gpu(device: int, environ: Mapping[str, str] = os.environ) -> GpuFacts:
    """GPU number `device`.

    Raises
    ------
    NoDriver
        If NVML cannot be used, or shows no GPU.
    ValueError
        If there is no GPU of that number.
    """
    found = gpus(environ)
    if not found:
        hidden = environ.get("CUDA_VISIBLE_DEVICES")
        why = "unset CUDA_VISIBLE_DEVICES" if hidden is not None else "start the container with --gpus all"
        raise NoDriver(f"the NVIDIA driver shows no GPU: {why}")
    require(device < len(found), "device", device, f"from 0 to {len(found) - 1}: this process sees {len(found)} GPU(s)")
    return found[device]


def conditions(device: int) -> dict[str, Any]:
    """Clock [MHz] of the SMs, power [W] and what throttles a GPU now; empty where NVML cannot be used."""
    try:
        seen = gpu(device)
    except (NoDriver, ValueError):
        return {}
    return {"clock_mhz": seen.clock_mhz, "power_w": seen.power_w, "throttled": list(seen.throttled)}


def used_mib(device: int) -> float | None:
    """Memory in use on GPU number `device`, by whomever [MiB]; None if it is not told."""
    with session() as nvml:
        memory = told(nvml, nvml.nvmlDeviceGetMemoryInfo, told(nvml, nvml.nvmlDeviceGetHandleByIndex, device))
    return None if memory is None else memory.used / 2**20


def _read(nvml: Any, handle: Any, uuid: str, index: int) -> GpuFacts:
    from dstack_lab.gpu_specs import _per_sm  # with numpy, which a look at the package should not cost

    def ask(name: str, *more: Any) -> Any:
        return told(nvml, getattr(nvml, name, _absent), handle, *more)

    capability, cores, mig = (
        ask("nvmlDeviceGetCudaComputeCapability"),
        ask("nvmlDeviceGetNumGpuCores"),
        ask("nvmlDeviceGetMigMode"),
    )
    memory, power = ask("nvmlDeviceGetMemoryInfo"), ask("nvmlDeviceGetPowerUsage")
    gpm, running = ask("nvmlGpmQueryDeviceSupport"), ask("nvmlDeviceGetComputeRunningProcesses")
    reasons = ask("nvmlDeviceGetCurrentClocksEventReasons") or 0
    try:
        sms = cores // _per_sm(tuple(capability))[0] if cores and capability else None
    except ValueError:  # older than any GPU this package knows
        sms = None
    return GpuFacts(
        index=index,
        name=str(ask("nvmlDeviceGetName") or "NVIDIA GPU"),
        uuid=uuid,
        sms=sms,
        capability=tuple(capability) if capability else None,
        memory_mib=None if memory is None else memory.total / 2**20,
        compute_mode=COMPUTE_MODES.get(ask("nvmlDeviceGetComputeMode")),
        mig=None if mig is None else bool(mig[0]),
        gpm=None if gpm is None else bool(gpm.isSupportedDevice),
        clock_mhz=ask("nvmlDeviceGetClockInfo", getattr(nvml, "NVML_CLOCK_SM", 1)),
        power_w=None if power is None else power / 1000,
        throttled=tuple(dict.fromkeys(text for bit, text in THROTTLES.items() if reasons & bit)),
        processes=None if running is None else tuple(process.pid for process in running),
    )


def _absent(*_: Any) -> None:
    """Stand in for a call that this pynvml does not have."""
