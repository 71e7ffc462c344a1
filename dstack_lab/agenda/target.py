"""Where an item is measured: the devices of this machine, the grids that suit them, and their provenance."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

from dstack_lab.checks import require
from dstack_lab.devices import Cpu, Device, nvml
from dstack_lab.provenance import Provenance, today, versions_here

#: What ``--device`` takes: ``gpu`` is both mechanisms.
KINDS = ("gpu", "mps", "green", "cpu")
#: Networks in order of importance: the workloads of the comparison first.
GPU_MODELS = (
    *("resnet50", "vgg19", "mobilenet_v2", "alexnet", "resnet18", "inception_v3", "resnext50_32x4d"),
    *("vit_b_16", "bert_base"),
)
CPU_MODELS = ("squeezenet1_1", "shufflenet_v2_x1_0")
BATCHES = (1, 2, 4, 8, 16, 32, 64)
SHARES = (5, 10, 15, 20, 25, 30, 40, 50, 60, 70, 80, 90, 100)
PACKAGES = ("dstack-lab", "torch", "torchvision", "numpy", "pandas", "nvidia-ml-py", "cuda-bindings")
#: No worker is refused for what it was granted, which is in every row: the step of a GPU is to be found out.
ANY_SMS = 10_000
#: Words of GPU names that tell nothing apart.
MAKERS = {"nvidia", "tesla", "geforce"}


@dataclass(frozen=True, slots=True)
class Target:
    """The hardware of a call.

    Parameters
    ----------
    kind : {"gpu", "mps", "green", "cpu"}
    quick : bool
        Small grids and short times, to try the whole path.
    without : tuple of str
        Mechanisms that cannot be had here after all (see `usable`).
    """

    kind: str = "gpu"
    quick: bool = False
    without: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require(self.kind in KINDS, "device", self.kind, f"one of {', '.join(KINDS)}")

    @property
    def on_gpu(self) -> bool:
        """Whether it is a GPU."""
        return self.kind != "cpu"

    @property
    def mechanisms(self) -> tuple[str, ...]:
        """Devices to measure on, the reference first."""
        every = ("mps", "green") if self.kind == "gpu" else (self.kind,)
        return tuple(mechanism for mechanism in every if mechanism not in self.without)

    def usable(self) -> tuple[Target, dict[str, str]]:
        """Try each mechanism once: return the target without those that cannot be had, and why they cannot.

        Starts the MPS daemon, which `stop` ends.

        Raises
        ------
        RuntimeError
            If none is left.
        """
        why = {}
        for mechanism in self.mechanisms:
            try:
                device: Any = self.device(mechanism)
                device.shares()
                if mechanism == "mps":
                    device.prepare()
            except (ValueError, RuntimeError, OSError) as error:
                why[mechanism] = f"{type(error).__name__}: {error}"
        if len(why) == len(self.mechanisms):
            raise RuntimeError("; ".join(f"{mechanism} cannot be used: {text}" for mechanism, text in why.items()))
        return replace(self, without=(*self.without, *why)), why

    def device(self, mechanism: str, **options: Any) -> Device:
        """Return a device of one of `mechanisms`."""
        if mechanism == "cpu":
            return Cpu(**options)
        if mechanism == "mps":
            from dstack_lab.devices.mps import Mps

            return Mps(**{"tolerance_sms": ANY_SMS, **options})
        from dstack_lab.devices.green import Green

        return Green(**options)

    @property
    def models(self) -> tuple[str, ...]:
        """Networks to measure."""
        few = 2 if self.quick else len(GPU_MODELS)
        return (GPU_MODELS if self.on_gpu else CPU_MODELS)[:few]

    @property
    def batches(self) -> tuple[int, ...]:
        """Batches to measure."""
        return (1, 4) if self.quick else BATCHES if self.on_gpu else (1, 2, 4, 8)

    def shares(self, device: Device) -> tuple[float, ...]:
        """Those that the device grants, nearest to the agenda's grid, in falling order: the whole tells most."""
        grid, wanted = device.shares(), (25, 100) if self.quick else SHARES
        return tuple(sorted({min(grid, key=lambda g: abs(g - w)) for w in wanted}, reverse=True))

    @property
    def name(self) -> str:
        """Short name of the hardware for files: ``"h200"``, ``"cpu"``."""
        return short_name(nvml.gpu(0).name) if self.on_gpu else "cpu"

    def provenance(self) -> Provenance:
        """Device, driver, torch, mechanism, versions and date of what is measured now."""
        versions = versions_here(*PACKAGES)
        if not self.on_gpu:
            device = Cpu()
            return Provenance("measured", device.describe(), device.mechanism, versions, today(), device.marks())
        driver, cuda = nvml.versions()
        gpu = nvml.gpu(0)
        versions |= {"driver": driver or "unknown", "cuda": "unknown" if cuda is None else f"{cuda[0]}.{cuda[1]}"}
        versions["kernel"] = os.uname().release
        sms = "" if gpu.sms is None else f", {gpu.sms} SMs"
        mechanism = " and ".join({"mps": "MPS", "green": "green contexts"}[m] for m in self.mechanisms)
        return Provenance("measured", f"{gpu.name}{sms}", mechanism, versions, today())

    def stop(self) -> None:
        """End the MPS daemon, if one was started."""
        if "mps" in self.mechanisms:
            from dstack_lab.devices.mps import Mps

            Mps().stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()


def short_name(gpu: str) -> str:
    """Return the part of a GPU's name that people say: ``"NVIDIA H100 80GB HBM3"`` is ``"h100"``."""
    words = [word for word in re.findall(r"[a-z0-9]+", gpu.lower()) if word not in MAKERS]
    end = next((i for i, word in enumerate(words) if any(c.isdigit() for c in word)), len(words) - 1)
    return "-".join(words[: end + 1]) or "gpu"


def spaced(values: Sequence[float], most: int) -> tuple[float, ...]:
    """At most this many of the values, from the first to the last, evenly spread."""
    if len(values) <= most:
        return tuple(values)
    return tuple(values[round(k * (len(values) - 1) / (most - 1))] for k in range(most))
