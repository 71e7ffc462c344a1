"""GPU% model from kernels: the service time of a network at any batch and share, without measuring.

A network is a sequence of kernels; each takes a serial time plus the longer of its arithmetic, in
waves of thread blocks over the SMs it may use, and its memory traffic. Formulation after Dhakal,
Kulkarni, Ramakrishnan (IEEE TCC 2024); the equations are this project's own.

``python -m dstack_lab.kernel_model`` writes the simulated profiles.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from dstack_lab import gpu_specs, zoo
from dstack_lab.checks import count, percent, require
from dstack_lab.files import data_folder
from dstack_lab.gpu_specs import GpuSpec
from dstack_lab.kernel_cost import CALIBRATIONS, Calibration, precision_of, work_seconds
from dstack_lab.kernels import Kernels, of_module
from dstack_lab.profiles import Profile
from dstack_lab.provenance import Provenance, today, versions_here

BATCHES = (1, 2, 4, 8, 16, 32, 64)
SHARES = (5, 10, 15, 20, 25, 30, 40, 50, 60, 70, 80, 90, 100)

#: GPUs whose simulated profiles are recorded.
RECORDED = ("v100", "t4", "a100", "h100", "h200")

#: A share is a kernel's knee when it is the smallest within this of the time at 100 %.
KNEE_TOLERANCE = 0.05


@dataclass(frozen=True, slots=True)
class KernelModel:
    """Service time of a network's kernels on a GPU.

    Never slower with more GPU%, never faster with a larger batch.

    Parameters
    ----------
    kernels : Kernels
        Of the network. Measured ones (`from_trace`) keep their time at 100 % and scale by waves.
    gpu : GpuSpec
        Where it runs.
    precision : {"torch", "fp32", "tf32", "fp16"}
        Of products. "torch" is PyTorch's default for float32: convolutions in TF32 where the GPU has
        it, matrix products in FP32. FP16 also halves the bytes.
    graphs : bool
        Whether kernels are launched as a CUDA graph. Without, the host launches one at a time, and a
        batch takes at least that long.
    calibration : Calibration, optional
        What the GPU reaches of its data sheet; the recorded one of its name, or the default.

    Raises
    ------
    ValueError
        Naming the argument that does not fit.
    """

    kernels: Kernels
    gpu: GpuSpec
    precision: str = "torch"
    graphs: bool = True
    calibration: Calibration | None = None

    def __post_init__(self) -> None:
        require(isinstance(self.kernels, Kernels), "kernels", type(self.kernels).__name__, "Kernels, of kernels.of_module")
        require(isinstance(self.gpu, GpuSpec), "gpu", type(self.gpu).__name__, "a GpuSpec, such as gpu_specs.V100")
        traced = self.kernels.traced_sms
        same = traced is None or traced == self.gpu.sms
        require(
            same, "gpu.sms", self.gpu.sms, f"{traced}, as the GPU that was traced: measured kernels say nothing of another GPU"
        )
        precision_of("conv", self.precision, self.gpu)
        if self.calibration is None:
            known = [c for name, c in CALIBRATIONS.items() if name in self.gpu.name.upper()]
            object.__setattr__(self, "calibration", known[-1] if known else Calibration())
        good = isinstance(self.calibration, Calibration)
        require(good, "calibration", type(self.calibration).__name__, "a Calibration, or None")

    def predict(self, batch: ArrayLike, gpu_pct: ArrayLike) -> float | np.ndarray:
        """Service time [ms].

        Parameters
        ----------
        batch : float or array
            1 or more; between two whole batches the time is interpolated, so that the model can be the
            ``prior`` of `lab.fit`.
        gpu_pct : float or array
            From 1 to 100; broadcast against `batch`.

        Returns
        -------
        float or numpy.ndarray
            A float if both are scalars, else an array of their common shape.
        """
        batches, shares = np.broadcast_arrays(np.asarray(batch, dtype=float), np.asarray(gpu_pct, dtype=float))
        good = np.isfinite(batches) & (batches >= 1)
        require(bool(good.all()), "batch", None if good.all() else float(batches[~good].flat[0]), "1 or more")
        out = np.empty(batches.shape)
        for value in np.unique(batches):
            here, whole = batches == value, int(value)
            out[here] = self._service_ms(whole, shares[here])
            if value > whole:
                out[here] += (value - whole) * (self._service_ms(whole + 1, shares[here]) - out[here])
        return float(out) if out.ndim == 0 else out

    def kernel_ms(self, batch: int, gpu_pct: ArrayLike) -> np.ndarray:
        """Time of each kernel [ms], its serial part included, shape (kernels, shares)."""
        compute, memory, serial, _ = self._parts(batch, np.atleast_1d(gpu_pct))
        times: np.ndarray = (np.maximum(compute, memory) + serial) * 1e3
        return times

    def breakdown(self, batch: int, gpu_pct: float = 100) -> pd.DataFrame:
        """Say what each kernel takes, and why.

        Returns
        -------
        pandas.DataFrame
            One row per kernel: ``operator``, ``kind``, ``fused``, ``flops``, ``bytes``; ``units``, the thread
            blocks of the fastest tile; ``compute_ms``, ``memory_ms``, ``serial_ms``; ``service_ms``, the
            longer of the first two plus the third; ``bound``, the largest of the three; ``knee_pct``,
            the smallest share within 5 % of the kernel's time at 100 %.
        """
        table = self.kernels.at(batch)
        compute, memory, serial, units = (x[:, 0] for x in self._parts(batch, np.array([percent("gpu_pct", gpu_pct)])))
        compute, memory, serial = compute * 1e3, memory * 1e3, serial * 1e3
        parts = pd.DataFrame({"compute": compute, "memory": memory, "launch": serial})
        return pd.DataFrame(
            {
                "operator": table["operator"],
                "kind": table["kind"],
                "fused": table["fused"],
                "flops": table["flops"],
                "bytes": table["read_bytes"] + table["written_bytes"],
                "units": units.astype(np.int64),
                "compute_ms": compute,
                "memory_ms": memory,
                "serial_ms": serial,
                "service_ms": np.maximum(compute, memory) + serial,
                "bound": parts.idxmax(axis=1),
                "knee_pct": self.kernel_knees_pct(batch),
            }
        )

    def kernel_knees_pct(self, batch: int) -> np.ndarray:
        """Smallest GPU% at which each kernel is within 5 % of its time at 100 %, of those that MPS tells apart."""
        sms = np.append(np.arange(self.gpu.sm_step, self.gpu.sms, self.gpu.sm_step), self.gpu.sms)
        shares = np.clip(sms * 100 / self.gpu.sms, 1, 100)
        times = self.kernel_ms(batch, shares)
        first = np.argmax(times <= (1 + KNEE_TOLERANCE) * times[:, -1:], axis=1)
        knees: np.ndarray = shares[first]
        return knees

    def _service_ms(self, batch: int, shares: np.ndarray) -> np.ndarray:
        assert self.calibration is not None
        total: np.ndarray = self.kernel_ms(batch, shares).sum(axis=0)
        if not self.graphs:  # the host runs ahead of the GPU, or the GPU waits for the host
            one = self.calibration.launch_us / 1e3
            total = np.maximum(total, len(self.kernels) * one) + one
        return total

    def _parts(self, batch: int, shares: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Arithmetic, memory and serial time [s] and thread blocks, each (kernels, shares)."""
        assert self.calibration is not None
        table = self.kernels.at(count("batch", batch))
        sms = self.gpu.sms_at(shares)
        if self.kernels.measured:
            units = np.repeat(table["units"].to_numpy(dtype=float)[:, None], len(sms), axis=1)
            waves = np.ceil(units / sms) / np.ceil(units / self.gpu.sms)
            compute = table["work_us"].to_numpy()[:, None] * 1e-6 * waves
            serial = np.repeat(table["gap_us"].to_numpy()[:, None] * 1e-6, len(sms), axis=1)
            return compute, np.zeros_like(compute), serial, units
        item = self.kernels.item_bytes
        compute, memory, units = work_seconds(table, self.gpu, sms, self.precision, item, self.calibration)
        serial = np.full_like(compute, self.calibration.kernel_us * 1e-6) * table["launches"].to_numpy()[:, None]
        return compute, memory, serial, units


def simulated_profile(
    gpu: GpuSpec,
    models: Iterable[str | zoo.Network] | None = None,
    batches: Sequence[int] = BATCHES,
    shares: Sequence[float] = SHARES,
    precision: str = "torch",
    graphs: bool = True,
    fused: bool = True,
) -> Profile:
    """Profile of networks on a GPU that need not be here.

    Parameters
    ----------
    gpu : GpuSpec
        Modelled.
    models : iterable of str or Network, optional
        Names for `zoo.load`, or networks of one's own; all of `zoo.names` by default.
    batches, shares : sequences
        The grid.
    precision, graphs
        As in `KernelModel`.
    fused : bool
        As in `kernels.of_module`; without both `fused` and `graphs` it is what eager PyTorch does.

    Returns
    -------
    Profile
        Strict, its provenance "simulated"; ``service_ms`` to 4 digits.

    Raises
    ------
    ValueError
        If a network cannot be traced, or a batch or share is out of range.
    """
    require(len(batches) > 0, "batches", batches, "1 or more batches")
    require(len(shares) > 0, "shares", shares, "1 or more GPU%")
    tables = []
    for model in zoo.names() if models is None else models:
        network = zoo.load(model, device="meta") if isinstance(model, str) else model
        kernels = of_module(network.module, network.example, network.name, fused)
        grid = pd.MultiIndex.from_product([batches, shares], names=["batch", "gpu_pct"]).to_frame(index=False)
        found = KernelModel(kernels, gpu, precision, graphs).predict(grid["batch"], grid["gpu_pct"])
        tables.append(grid.assign(model=network.name, service_ms=[float(f"{ms:.4g}") for ms in np.atleast_1d(found)]))
    require(bool(tables), "models", models, "1 or more networks")
    origin = Provenance(
        kind="simulated",
        device=f"{gpu.name}-like, {gpu.sms} SMs, {_precision_text(precision, gpu)}",
        mechanism="model",
        versions=versions_here("dstack-lab", "numpy", "torch", "torchvision"),
        date=today(),
    )
    return Profile(pd.concat(tables)[["model", "batch", "gpu_pct", "service_ms"]], origin, strict=True)


def _precision_text(precision: str, gpu: GpuSpec) -> str:
    """Return the precision as a reader knows it."""
    conv, product = (precision_of(kind, precision, gpu).upper() for kind in ("conv", "matmul"))
    return conv if conv == product else f"{product}, convolutions in {conv}"


def write_simulated_profiles(folder: str | Path | None = None) -> list[Path]:
    """Write ``<gpu>-simulated.csv`` of every recorded GPU and every network of the zoo.

    Parameters
    ----------
    folder : path, optional
        Where to; the folder that `load_profile` reads by default.
    """
    into = data_folder() / "profiles" if folder is None else Path(folder)
    written = []
    for name in RECORDED:
        profile = simulated_profile(gpu_specs.SPECS[name])
        written.append(profile.save(into / f"{name}-simulated.csv"))
    return written


if __name__ == "__main__":
    for written_path in write_simulated_profiles():
        print(f"wrote {written_path.name}")
