"""GPUs by their data sheets, or as the driver of this machine describes its own.

Sources of the recorded figures, all NVIDIA's, without sparsity:

- V100: "NVIDIA Tesla V100 GPU Architecture" white paper, SXM2: table 1 (80 SMs, 1530 MHz boost,
  15.7 TFLOPS FP32, 125 tensor TFLOPS, 6144 KB L2, 900 GB/s, 16 GB).
- P100: "NVIDIA Tesla P100" white paper, SXM2: table 1 (56 SMs, 1480 MHz, 10.6 TFLOPS FP32, 21.2
  FP16, 4096 KB L2, 732 GB/s, 16 GB).
- T4: "NVIDIA Turing GPU Architecture" white paper, appendix A (40 SMs, 1590 MHz, 8.1 TFLOPS FP32,
  65 tensor TFLOPS, 4096 KB L2, 320 GB/s, 16 GB).
- A100: "NVIDIA A100 Tensor Core GPU Architecture" white paper, SXM4 40 GB: tables 1 and 4 (108 SMs, 1410 MHz,
  19.5 TFLOPS FP32, 156 TF32, 312 FP16, 40 MB L2, 1555 GB/s).
- H100: "NVIDIA H100 Tensor Core GPU Architecture" white paper, SXM5: table 4 and the H100 data
  sheet (132 SMs, 1980 MHz, 66.9 TFLOPS FP32, 494.7 TF32, 989.4 FP16, 50 MB L2, 3352 GB/s, 80 GB).
- H200: "NVIDIA H200 Tensor Core GPU" data sheet, SXM: the chip of the H100 with 141 GB at 4.8 TB/s.
- SMs come in pairs (texture processing clusters) on all of these; that MPS grants pairs is assumed. Its guide
  says a share is rounded down; the public V100 measurements at 2, 4 and 6 % (an older driver, whose
  guide said up) only make sense rounded up.
- Threads and blocks an SM holds: "CUDA C++ Programming Guide", technical specifications per
  compute capability 6.0, 7.0, 7.5, 8.0 and 9.0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from dstack_lab.checks import count, non_negative, positive, require

PRECISIONS = ("fp32", "tf32", "fp16")

#: Bytes of one number. TF32 is a way to multiply: it is stored as FP32.
ITEM_BYTES = {"fp32": 4, "tf32": 4, "fp16": 2}


@dataclass(frozen=True, slots=True)
class GpuSpec:
    """What a GPU can do at most.

    Parameters
    ----------
    name : str
        Such as ``"V100"``.
    sms : int
        Streaming multiprocessors.
    clock_mhz : float
        Boost clock.
    fp32_tflops, tf32_tflops, fp16_tflops : float
        Peak rate of multiply-adds counted as 2, on the fastest units that take the precision
        (tensor cores where there are); ``tf32_tflops`` is NaN where the GPU has no TF32.
    bandwidth_gb_s : float
        Peak rate of the device memory [10^9 bytes/s].
    l2_mib : float
        Second-level cache, shared by all SMs.
    memory_gib : float
        Device memory.
    sm_threads, sm_blocks : int
        Threads and thread blocks that one SM holds at most.
    sm_step : int
        SMs are granted in multiples of this.
    rounds_up : bool
        Whether a share that falls between two multiples gets the larger one.
    """

    name: str
    sms: int
    clock_mhz: float
    fp32_tflops: float
    fp16_tflops: float
    bandwidth_gb_s: float
    l2_mib: float
    memory_gib: float
    tf32_tflops: float = field(default=math.nan, kw_only=True)
    sm_threads: int = field(default=2048, kw_only=True)
    sm_blocks: int = field(default=32, kw_only=True)
    sm_step: int = field(default=2, kw_only=True)
    rounds_up: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        require(isinstance(self.name, str) and bool(self.name), "gpu.name", self.name, "a non-empty text")
        for name in ("sms", "sm_threads", "sm_blocks", "sm_step"):
            count(f"gpu.{name}", getattr(self, name))
        for name in ("clock_mhz", "fp32_tflops", "fp16_tflops", "bandwidth_gb_s", "memory_gib"):
            positive(f"gpu.{name}", getattr(self, name))
        non_negative("gpu.l2_mib", self.l2_mib)
        if not math.isnan(self.tf32_tflops):
            positive("gpu.tf32_tflops", self.tf32_tflops)

    def tflops(self, precision: str) -> float:
        """Peak rate [10^12 operations/s] at ``"fp32"``, ``"tf32"`` or ``"fp16"``.

        Raises
        ------
        ValueError
            If the precision is unknown, or the GPU has no TF32.
        """
        require(precision in PRECISIONS, "precision", precision, f"one of {PRECISIONS}")
        rate = {"fp32": self.fp32_tflops, "tf32": self.tf32_tflops, "fp16": self.fp16_tflops}[precision]
        require(not math.isnan(rate), "precision", precision, f"'fp32' or 'fp16' on {self.name}, which has no TF32")
        return rate

    def sms_at(self, gpu_pct: ArrayLike) -> np.ndarray:
        """SMs that a GPU% grants: a multiple of `sm_step`, at least one; same shape as `gpu_pct`.

        Raises
        ------
        ValueError
            If a share is not between 1 and 100.
        """
        share = np.asarray(gpu_pct, dtype=float)
        good = (share >= 1) & (share <= 100)
        require(bool(np.all(good)), "gpu_pct", share[~good].flat[0] if not np.all(good) else None, "a GPU% from 1 to 100")
        steps = self.sms * share / 100 / self.sm_step
        whole = np.ceil(steps - 1e-9) if self.rounds_up else np.floor(steps + 1e-9)
        granted: np.ndarray = np.clip(whole * self.sm_step, self.sm_step, self.sms).astype(np.int64)
        return np.where(share == 100, self.sms, granted)

    def shares(self) -> tuple[float, ...]:
        """GPU% that grant one more `sm_step` each, in rising order: what a plan can use. Two decimals."""
        inward = math.floor if self.rounds_up else math.ceil  # a rounded share must still grant as many SMs
        grants = range(self.sm_step, self.sms + 1, self.sm_step)
        shares = (inward(10_000 * n / self.sms) / 100 for n in grants)
        return tuple(min(share, 100.0) for share in shares if share >= 1)

    @classmethod
    def from_device(cls, index: int = 0) -> GpuSpec:
        """Describe a GPU of this machine: SMs and caches as torch sees them, clocks from NVML.

        Parameters
        ----------
        index : int
            Of the CUDA device, 0 or more.

        Raises
        ------
        ValueError
            If there is no such GPU, no driver, or the driver does not tell its clocks.
        """
        count("index", index, least=0)
        import torch

        there = torch.cuda.device_count() if torch.cuda.is_available() else 0
        cure = "use a GPU machine with a CUDA build of torch, or a data sheet such as gpu_specs.V100"
        if there == 0:
            raise ValueError(f"device = no CUDA GPU found by torch {torch.__version__}: {cure}")
        require(index < there, "index", index, f"from 0 to {there - 1}, the GPUs of this machine")
        seen = torch.cuda.get_device_properties(index)
        clock_mhz, bandwidth_gb_s = _from_driver(str(seen.uuid))
        cores, tensor, has_tf32 = _per_sm((seen.major, seen.minor))
        per_clock = seen.multi_processor_count * clock_mhz * 1e6 / 1e12
        return cls(
            name=seen.name,
            sms=seen.multi_processor_count,
            clock_mhz=clock_mhz,
            fp32_tflops=per_clock * cores * 2,
            fp16_tflops=per_clock * tensor,
            bandwidth_gb_s=bandwidth_gb_s,
            l2_mib=seen.L2_cache_size / 2**20,
            memory_gib=seen.total_memory / 2**30,
            tf32_tflops=per_clock * tensor / 2 if has_tf32 else math.nan,
            sm_threads=seen.max_threads_per_multi_processor,
            sm_blocks=16 if (seen.major, seen.minor) in ((7, 5), (8, 6)) else 24 if (seen.major, seen.minor) == (8, 9) else 32,
        )


V100 = GpuSpec("V100", 80, 1530, 15.7, 125, 900, 6, 16, rounds_up=True)
P100 = GpuSpec("P100", 56, 1480, 10.6, 21.2, 732, 4, 16)
T4 = GpuSpec("T4", 40, 1590, 8.1, 65, 320, 4, 16, sm_threads=1024, sm_blocks=16)
A100 = GpuSpec("A100", 108, 1410, 19.5, 312, 1555, 40, 40, tf32_tflops=156)
H100 = GpuSpec("H100", 132, 1980, 66.9, 989.4, 3352, 50, 80, tf32_tflops=494.7)
H200 = GpuSpec("H200", 132, 1980, 66.9, 989.4, 4800, 50, 141, tf32_tflops=494.7)

#: The recorded GPUs by the name that profiles use.
SPECS = {spec.name.lower(): spec for spec in (V100, P100, T4, A100, H100, H200)}

#: By compute capability: FP32 cores of an SM, FP16 operations it does in one clock (tensor cores
#: accumulating in FP32), whether it has TF32. Same white papers; 8.6 and 8.9: those of GA102 and AD102.
_SM = {
    (6, 0): (64, 256, False),
    (7, 0): (64, 1024, False),
    (7, 5): (64, 1024, False),
    (8, 0): (64, 2048, True),
    (8, 6): (128, 512, True),
    (8, 9): (128, 1024, True),
    (9, 0): (128, 4096, True),
    (10, 0): (128, 8192, True),
}


def _per_sm(capability: tuple[int, int]) -> tuple[int, int, bool]:
    """Rates of an SM of this capability, or of the latest one before it that is known."""
    known = [c for c in sorted(_SM) if c <= capability]
    require(bool(known), "compute capability", capability, "6.0 or later")
    return _SM[known[-1]]


def _from_driver(uuid: str) -> tuple[float, float]:
    """Highest SM clock [MHz] and memory bandwidth [GB/s] of the GPU with this UUID."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise ValueError(f"device = NVML does not answer ({error}): needs the NVIDIA driver's libnvidia-ml") from error
    try:
        handle: Any = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}")
        clock = float(pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM))
        memory = float(pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_MEM))
        width = float(pynvml.nvmlDeviceGetMemoryBusWidth(handle))
    except pynvml.NVMLError as error:
        raise ValueError(f"device = the driver does not tell clocks or bus width ({error}): give a GpuSpec by hand") from error
    finally:
        pynvml.nvmlShutdown()
    return clock, 2 * memory * 1e6 * width / 8 / 1e9  # two transfers a clock
