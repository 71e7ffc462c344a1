"""How long one kernel takes on a number of SMs: tiles, waves and bandwidth.

Formulation after Dhakal, Kulkarni, Ramakrishnan (IEEE TCC 2024), with public knowledge of how CUDA
libraries cut up a product; none of it is the paper's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from dstack_lab.checks import count, positive, require
from dstack_lab.gpu_specs import ITEM_BYTES, GpuSpec

#: Tiles a library can cut a product into: rows, columns, warps of a block, blocks an SM holds, and
#: how well the block's instructions use the arithmetic units relative to the largest tile.
TILES = (
    (256, 128, 8, 1, 1.0),
    (128, 128, 8, 2, 1.0),
    (128, 64, 4, 4, 0.97),
    (64, 64, 2, 8, 0.85),
    (64, 32, 1, 16, 0.7),
    (32, 32, 0.5, 32, 0.5),
)
#: Pieces a matrix product's depth can be cut into, and the least depth of a piece. Orion's V100
#: kernels show cuBLAS doing so, cuDNN's convolutions not.
SPLITS, SPLIT_DEPTH = (1, 2, 4, 8), 128
#: Warps at which an SM reaches half its rate: one block of 4 warps gets to 59 %, 16 warps to 85 %.
HALF_RATE_WARPS = 2.8
#: What the second-level cache delivers to one SM [bytes/clock]; measured 20 (V100) to 47 (A100).
L2_BYTES_PER_CLOCK = 32
#: A 3 x 3 convolution by Winograd's method pays off from this depth on.
WINOGRAD_DEPTH = 288
#: What float32 tensors are multiplied in. "torch" is PyTorch's default: convolutions in TF32 where
#: the GPU has it, matrix products in FP32.
PRECISIONS = ("fp32", "tf32", "fp16", "torch")
#: Warps of one block of attention, and blocks an SM holds.
ATTENTION_WARPS, ATTENTION_RESIDENT = 4, 2


@dataclass(frozen=True, slots=True)
class Calibration:
    """What a GPU reaches of its data sheet: the same for every network.

    Parameters
    ----------
    fp32_efficiency, tensor_efficiency : float
        Part of the peak rate that a product in large tiles reaches, on FP32 cores or tensor cores.
    winograd_gain : float
        Multiply-adds that Winograd's method saves, as a factor on FP32 cores.
    depthwise_efficiency, attention_efficiency : float
        As above, of depthwise convolutions (of the FP32 rate) and of fused attention.
    bandwidth_efficiency : float
        Part of the peak memory bandwidth that kernels reach.
    saturating_share : float
        Part of the SMs that is needed to pull all of it.
    kernel_us : float
        Serial time of each kernel: start, drain, and the gap to the next one.
    launch_us : float
        Time the host needs to launch a kernel; CUDA graphs do without it.
    max_split : int
        Pieces that the libraries cut the depth of a matrix product into at most.
    """

    fp32_efficiency: float = 0.9
    tensor_efficiency: float = 0.65
    winograd_gain: float = 1.7
    depthwise_efficiency: float = 0.05
    attention_efficiency: float = 0.5
    bandwidth_efficiency: float = 0.7
    saturating_share: float = 0.3
    kernel_us: float = 6.0
    launch_us: float = 5.0
    max_split: int = 8

    def __post_init__(self) -> None:
        for name in self.__slots__:
            positive(f"calibration.{name}", getattr(self, name))
        count("calibration.max_split", self.max_split)


#: The V100's constants fit public measurements of 2019 (benchmarks/accuracy_kernels.py); without
#: cutting depths they fit best, perhaps because the libraries of that year did not. The others are
#: not fitted: they take these over, but for shorter gaps on later GPUs, and the T4's clock at its
#: 70 W limit; both are assumptions.
CALIBRATIONS = {
    "P100": Calibration(),
    "V100": Calibration(max_split=1),
    "T4": Calibration(fp32_efficiency=0.65),
    "A100": Calibration(kernel_us=4.0),
    "H100": Calibration(kernel_us=3.0),
    "H200": Calibration(kernel_us=3.0),
}


def precision_of(kind: str, precision: str, gpu: GpuSpec) -> str:
    """Return what kernels of this kind compute in on this GPU.

    Raises
    ------
    ValueError
        If the precision is unknown, or the GPU does not have it.
    """
    require(precision in PRECISIONS, "precision", precision, f"one of {PRECISIONS}")
    if precision == "torch":
        return "tf32" if kind == "conv" and not np.isnan(gpu.tf32_tflops) else "fp32"
    gpu.tflops(precision)
    return precision


def work_seconds(
    table: pd.DataFrame, gpu: GpuSpec, sms: np.ndarray, precision: str, item_bytes: int, calibration: Calibration
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Time of each kernel without its serial part.

    Parameters
    ----------
    table : pandas.DataFrame
        Of `Kernels.at`, n rows.
    gpu, precision, calibration
        See `KernelModel`.
    sms : numpy.ndarray
        SMs allowed, shape (m,).
    item_bytes : int
        Bytes of one number in the table's byte columns.

    Returns
    -------
    compute_s, memory_s : numpy.ndarray
        Shape (n, m) [s]: arithmetic alone and memory alone; a kernel takes the longer.
    units : numpy.ndarray
        Shape (n, m): thread blocks of the tile that is fastest there.
    """
    kind = table["kind"].to_numpy()
    bytes_moved = (table["read_bytes"] + table["written_bytes"]).to_numpy() * (2 if precision == "fp16" else 4) / item_bytes
    saturation = np.minimum(1.0, sms / (calibration.saturating_share * gpu.sms))
    bandwidth = gpu.bandwidth_gb_s * 1e9 * calibration.bandwidth_efficiency * saturation
    memory = bytes_moved[:, None] / bandwidth
    compute = np.zeros_like(memory)
    units = np.repeat(table["units"].to_numpy(dtype=float)[:, None], len(sms), axis=1)
    waves = np.ceil(units / sms)
    flops = table["flops"].to_numpy()[:, None]
    fp32_sm = gpu.fp32_tflops * 1e12 / gpu.sms
    depthwise = kind == "depthwise"
    compute[depthwise] = (flops / units * waves / (fp32_sm * calibration.depthwise_efficiency))[depthwise]
    attention = kind == "attention"
    rate = gpu.tflops(precision_of("attention", precision, gpu)) * 1e12 / gpu.sms * calibration.attention_efficiency
    crowd = waves + HALF_RATE_WARPS / ATTENTION_WARPS * np.maximum(1.0, waves / ATTENTION_RESIDENT)
    compute[attention] = (flops / units * crowd / rate)[attention]
    for name in ("conv", "matmul"):
        here = kind == name
        if here.any():
            own = precision_of(name, precision, gpu)
            found = _product_seconds(table[here], gpu, sms, own, calibration, memory[here], bandwidth)
            compute[here], memory[here], units[here] = found
    return compute, memory, units


def _product_seconds(
    table: pd.DataFrame,
    gpu: GpuSpec,
    sms: np.ndarray,
    precision: str,
    calibration: Calibration,
    memory: np.ndarray,
    bandwidth: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Arithmetic and memory time of products, each with its fastest tile and split.

    Every tile's time rises with the batch and falls with the SMs, so the least of them does too.
    """
    rows, cols, depth, groups = (table[c].to_numpy()[:, None] for c in ("rows", "cols", "depth", "groups"))
    matmul = (table["kind"] == "matmul").to_numpy()[:, None]
    on_tensor_cores = precision != "fp32" and gpu.tflops(precision) > 3 * gpu.fp32_tflops
    efficiency = calibration.tensor_efficiency if on_tensor_cores else calibration.fp32_efficiency
    peak = gpu.tflops(precision) * 1e12 / gpu.sms * efficiency
    l2_rate = L2_BYTES_PER_CLOCK * gpu.clock_mhz * 1e6
    winograd = table["winograd"].to_numpy(dtype=bool)[:, None] & (depth >= WINOGRAD_DEPTH) & (not on_tensor_cores)
    saved = np.where(winograd, calibration.winograd_gain, 1.0)
    best: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
    for tile_rows, tile_cols, warps, resident, quality in TILES:
        tiles = groups * np.ceil(rows / tile_rows) * np.ceil(cols / tile_cols)
        # a tile's operands come from the second-level cache: small tiles starve tensor cores
        fed = l2_rate * 2 * tile_rows * tile_cols / ((tile_rows + tile_cols) * ITEM_BYTES[precision])
        rate = min(peak * quality, fed)
        for split in SPLITS:
            possible = (split == 1) | (matmul & (depth / split >= SPLIT_DEPTH) & (split <= calibration.max_split))
            if not possible.any():
                continue
            blocks = tiles * split
            work = 2 * tile_rows * tile_cols * np.ceil(depth / split / 8) * 8 / saved
            per_sm = np.ceil(blocks / sms)
            compute = work / rate * (per_sm + HALF_RATE_WARPS / warps * np.maximum(1.0, per_sm / resident))
            partial = 2 * split * rows * cols * groups * 4 * (split > 1)  # partial sums are written and read, in FP32
            moved = memory + partial / bandwidth
            total = np.where(possible, np.maximum(compute, moved), np.inf)
            blocks = np.broadcast_to(blocks, total.shape)
            if best is None:
                best = compute, moved, blocks
            else:
                better = total < np.maximum(best[0], best[1])
                best = tuple(np.where(better, new, old) for new, old in zip((compute, moved, blocks), best, strict=True))  # type: ignore[assignment]
    assert best is not None
    return best
