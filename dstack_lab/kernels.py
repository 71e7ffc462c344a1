"""A network as a sequence of GPU kernels: what each computes, moves and can run side by side.

`of_module` finds them on the meta device (no GPU, no weights, no memory), `from_trace` reads
measured ones from a torch.profiler trace. Formulation after Dhakal, Kulkarni, Ramakrishnan (IEEE
TCC 2024); the numbers of a thread block are those of common CUDA libraries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from dstack_lab.checks import count, require

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dstack_lab.operations import Operation

#: Columns that grow linearly with the batch.
LINEAR = ("flops", "read_bytes", "written_bytes", "rows", "cols", "depth", "groups")

#: Results of one thread block [rows x cols] of a matrix product, and blocks an SM holds: the
#: 128 x 64 tile that cuDNN and cuBLAS use most for single precision.
TILE_ROWS, TILE_COLS, TILE_RESIDENT = 128, 64, 4
#: Matrix products (cuBLAS), unlike convolutions (cuDNN), are also cut along their depth; a piece has
#: at least this many multiply-adds per result.
SPLIT_DEPTH = 128
#: Results of one block of 128 threads, four each, of an element-wise kernel.
POINTWISE_RESULTS, POINTWISE_RESIDENT = 512, 16
#: Results of one block of 256 threads of a depthwise convolution.
DEPTHWISE_RESULTS, DEPTHWISE_RESIDENT = 256, 8
#: Rows of queries of one block of fused attention.
ATTENTION_ROWS, ATTENTION_RESIDENT = 64, 2
#: A block of batch normalisation serves one channel of one item.
NORM_RESIDENT = 4

#: Batches at which a module is traced; the third checks that the first two tell all.
TRACED = (2, 3, 5)


@dataclass(frozen=True, slots=True, eq=False)
class Kernels:
    """The kernels of one network, in order, at any batch.

    Parameters
    ----------
    name : str
        The network.
    fixed, per_item : pandas.DataFrame
        One row per kernel, the columns of `LINEAR`: a value at batch b is ``fixed + b * per_item``.
    labels : pandas.DataFrame
        One row per kernel: ``operator``, ``kind``, ``winograd`` and ``fused`` (what went into it);
        of a measured trace also ``units``, ``resident``, ``work_us`` and ``gap_us``.
    parameters : int
        Numbers the network has learnt; 0 if unknown.
    item_bytes : int
        Bytes of one number in the byte columns.
    only_batch : int or None
        The batch a measured trace was taken at; it says nothing of other batches.
    traced_sms : int or None
        SMs of the GPU that was traced, if the trace tells.
    """

    name: str
    fixed: pd.DataFrame
    per_item: pd.DataFrame
    labels: pd.DataFrame
    parameters: int = 0
    item_bytes: int = 4
    only_batch: int | None = None
    traced_sms: int | None = None

    def __post_init__(self) -> None:
        require(len(self.labels) > 0, "kernels", 0, "1 or more")
        for field in ("fixed", "per_item"):
            table = getattr(self, field)
            require(len(table) == len(self.labels), f"kernels.{field} rows", len(table), f"{len(self.labels)}, as in labels")
            require(set(LINEAR) <= set(table.columns), f"kernels.{field} columns", list(table.columns), f"at least {LINEAR}")
        count("kernels.item_bytes", self.item_bytes)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def measured(self) -> bool:
        """Whether a GPU was traced, so that ``work_us`` and ``gap_us`` are known."""
        return self.only_batch is not None

    def at(self, batch: int) -> pd.DataFrame:
        """Table of the kernels at one batch.

        Returns
        -------
        pandas.DataFrame
            One row per kernel: ``operator``, ``kind``, ``fused``; ``flops`` (2 per multiply-add);
            ``read_bytes``, ``written_bytes``; ``units``, the thread blocks it offers, and ``resident``,
            how many of them an SM holds; ``sms``, the SMs it can fill; ``launches``, its serial part; the matrix shape
            ``rows``, ``cols``, ``depth``, ``groups`` and ``winograd`` (a 3 x 3 convolution of stride 1);
            ``work_us`` and ``gap_us`` (idle before it), NaN unless measured.

        Raises
        ------
        ValueError
            If the batch is no positive integer, or not the one of a measured trace.
        """
        batch = count("batch", batch)
        if self.measured:
            require(batch == self.only_batch, "batch", batch, f"{self.only_batch}, the batch of the trace: trace others too")
        numbers = self.fixed[list(LINEAR)] + batch * self.per_item[list(LINEAR)]
        table = pd.concat([self.labels, numbers], axis=1)
        table["launches"] = 1
        if not self.measured:
            table["units"], table["resident"] = _blocks(table, batch)
            table["work_us"] = table["gap_us"] = np.nan
        table["sms"] = np.ceil(table["units"] / table["resident"]).astype(np.int64)
        first = ["operator", "kind", "fused", "flops", "read_bytes", "written_bytes", "units", "resident", "sms", "launches"]
        return table[first + ["rows", "cols", "depth", "groups", "winograd", "work_us", "gap_us"]]

    def flops(self, batch: int = 1) -> float:
        """Floating-point operations of one batch, 2 per multiply-add; NaN for a measured trace."""
        return float(self.at(batch)["flops"].sum(skipna=False))


def of_module(
    module: nn.Module,
    example: Tensor | Sequence[Tensor] | Callable[[int], tuple[Tensor, ...]],
    name: str | None = None,
    fused: bool = True,
) -> Kernels:
    """Kernels of any torch module, found without a GPU.

    Parameters
    ----------
    module : torch.nn.Module
        In any mode, on any device; stays as it is. It is traced in evaluation mode.
    example : tensor, tensors, or callable
        Inputs with the batch as first dimension, or ``example(batch)`` that makes them (such as
        ``Network.example``). Only shapes matter.
    name : str, optional
        The network's name; its class otherwise.
    fused : bool
        Whether to merge operations as every inference stack does (see `fusion`). Without, it is
        what eager PyTorch launches.

    Raises
    ------
    ValueError
        If the module cannot be traced without numbers, or its kernels do not grow linearly with the batch.
    """
    from torch import nn

    from dstack_lab import fusion
    from dstack_lab.operations import record

    require(isinstance(module, nn.Module), "module", type(module).__name__, "a torch.nn.Module")
    make = example if callable(example) else _shapes(example)
    name = type(module).__name__ if name is None else name
    runs: list[list[Operation]] = []
    for batch in TRACED:
        operations = fusion.merge_attention(record(module, make(batch)), every=fused)
        runs.append(fusion.fuse(operations) if fused else operations)
    same = all([op.operator for op in run] == [op.operator for op in runs[0]] for run in runs)
    require(same, f"kernels of {name}", "other kernels at other batches", "the same at every batch: trace each batch on a GPU")
    tables = [_numbers(run) for run in runs]
    per_item = (tables[1] - tables[0]) / (TRACED[1] - TRACED[0])
    fixed = tables[0] - TRACED[0] * per_item
    told, seen = (fixed + TRACED[2] * per_item).to_numpy(), tables[2].to_numpy()
    off = np.abs(told - seen) > 1e-6 * np.abs(seen) + 1e-6
    if off.any():
        row, column = np.argwhere(off)[0]
        require(False, f"{LINEAR[column]} of {runs[0][row].operator} in {name}", seen[row, column], "linear in the batch")
    labels = pd.DataFrame(
        {
            "operator": [op.operator for op in runs[0]],
            "kind": [op.kind for op in runs[0]],
            "fused": ["+".join(op.parts) for op in runs[0]],
            "winograd": [op.winograd for op in runs[0]],
        }
    )
    learnt = list(module.parameters())
    size = next((p.element_size() for p in learnt if p.is_floating_point()), 4)
    return Kernels(name, fixed, per_item, labels, sum(p.numel() for p in learnt), size)


def _shapes(example: Tensor | Sequence[Tensor]) -> Callable[[int], tuple[Tensor, ...]]:
    """Return a function that makes meta inputs of the example's shapes at any batch."""
    import torch

    given = (example,) if isinstance(example, torch.Tensor) else tuple(example) if isinstance(example, (tuple, list)) else ()
    good = bool(given) and all(isinstance(t, torch.Tensor) and t.dim() > 0 for t in given)
    require(good, "example", type(example).__name__, "a tensor, or a tuple of tensors, with the batch as first dimension")
    return lambda batch: tuple(torch.empty((batch, *t.shape[1:]), dtype=t.dtype, device="meta") for t in given)


def _numbers(operations: list[Operation]) -> pd.DataFrame:
    rows = [
        (op.flops, sum(op.reads.values()), sum(op.writes.values()), op.rows, op.cols, op.depth, op.groups) for op in operations
    ]
    return pd.DataFrame(rows, columns=list(LINEAR), dtype=float)


def _blocks(table: pd.DataFrame, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Thread blocks of each kernel and how many of its blocks an SM holds."""
    kind = table["kind"].to_numpy()
    rows, cols, depth, groups = (table[c].to_numpy() for c in ("rows", "cols", "depth", "groups"))
    tiles = groups * np.ceil(rows / TILE_ROWS) * np.ceil(cols / TILE_COLS)
    results = rows * cols * groups
    choices = {
        "conv": (tiles, TILE_RESIDENT),
        "matmul": (tiles * np.maximum(np.floor(depth / SPLIT_DEPTH), 1), TILE_RESIDENT),
        "attention": (groups * np.ceil(rows / ATTENTION_ROWS), ATTENTION_RESIDENT),
        "depthwise": (np.ceil(results / DEPTHWISE_RESULTS), DEPTHWISE_RESIDENT),
        "rows": (rows, POINTWISE_RESIDENT),
        "norm": (groups * batch, NORM_RESIDENT),
    }
    units, resident = np.ceil(rows / POINTWISE_RESULTS), np.full(len(table), POINTWISE_RESIDENT)
    for name, (blocks, held) in choices.items():
        units, resident = np.where(kind == name, blocks, units), np.where(kind == name, held, resident)
    return np.maximum(units, 1).astype(np.int64), resident.astype(np.int64)
