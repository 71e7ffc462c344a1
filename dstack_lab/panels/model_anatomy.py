"""Why is there a knee? The kernels of a network, what bounds each, and the share each can use."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import numpy as np

from dstack_lab import figures, gpu_specs, kernels, zoo
from dstack_lab.checks import require
from dstack_lab.figures.anatomies import parts_of
from dstack_lab.kernel_model import KernelModel
from dstack_lab.knees import knee_pct
from dstack_lab.panels.base import Look, Panel


class ModelAnatomy(Panel):
    """Per-kernel view of a network on a GPU that need not be here.

    Parameters
    ----------
    models : str or iterable of str, optional
        Networks of `lab.zoo` to offer; all by default.
    gpu : str
        GPU of `lab.gpu_specs` to begin with.

    Attributes
    ----------
    model, gpu, batch, gpu_pct
        Controls.
    """

    def __init__(self, models: Iterable[str] | str | None = None, gpu: str = "V100") -> None:
        super().__init__()
        gpus = [spec.name for spec in gpu_specs.SPECS.values()]
        require(gpu in gpus, "gpu", gpu, f"one of {', '.join(gpus)}")
        self._networks(models, zoo.names(), "Whose kernels are drawn", "the zoo")
        self.gpu = self._choice("gpu", "GPU", gpus, "Modelled from its data sheet", gpu)
        self.batch = self._slider("batch", "Batch [requests]", 1, 64, 1, "Requests answered by one launch")
        self.gpu_pct = self._slider("gpu_pct", "Share [GPU%]", 1, 100, 50, "Part of the GPU's multiprocessors")
        self._begin()

    def _look(self) -> Look:
        name, gpu, batch, share = self.model.value, self.gpu.value, self.batch.value, self.gpu_pct.value
        model = KernelModel(kernels_of(name), gpu_specs.SPECS[gpu.lower()])
        table = model.breakdown(batch, share)
        parts = {kind: round(part, 1) for kind, part in parts_of(table).items()}
        ms, whole = float(table["service_ms"].sum()), whole_knee_pct(name, gpu, batch)
        widest = table.iloc[int(table["units"].to_numpy().argmax())]
        enough = float(table.loc[table["knee_pct"] <= share, "service_ms"].sum()) / ms
        facts = {
            "model": name,
            "gpu": gpu,
            "batch": batch,
            "gpu_pct": share,
            "kernels": len(table),
            "service_ms": round(ms, 3),
            "time_pct": parts,
            "widest_units": int(widest["units"]),
            "widest": str(widest["operator"]),
            "knee_pct": round(whole, 1),
            "median_kernel_knee_pct": round(float(table["knee_pct"].median()), 1),
            "enough_pct": round(100 * enough, 1),
        }
        words = (
            f"{name} at batch {batch} is {len(table)} kernels that take {ms:.3g} ms on {share} % of a {gpu}-like GPU: "
            f"{parts['compute']:g} % of the time in kernels bound by arithmetic, {parts['memory']:g} % by memory bandwidth, "
            f"{parts['launch']:g} % by the launch itself. The widest offers {facts['widest_units']:,} thread blocks. Kernels "
            f"that {share} % is enough for take {100 * enough:.0f} % of the time; the whole network's knee is {whole:.0f} %."
        )
        return Look(facts, words, figures.anatomy(model, batch, share, table=table))


@lru_cache(maxsize=32)
def kernels_of(name: str) -> kernels.Kernels:
    """Trace a network once; it takes a third of a second."""
    network = zoo.load(name, device="meta")
    return kernels.of_module(network.module, network.example, network.name)


@lru_cache(maxsize=512)
def whole_knee_pct(name: str, gpu: str, batch: int) -> float:
    """Smallest whole GPU% within 5 % of the network's time on all of the GPU."""
    shares = np.arange(1.0, 101.0)
    model = KernelModel(kernels_of(name), gpu_specs.SPECS[gpu.lower()])
    return float(knee_pct(shares, np.asarray(model.predict(batch, shares)), "tolerance", batch=batch))
