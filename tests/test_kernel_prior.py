"""Bottom-up and top-down together: the kernel model's shape, corrected by a few measured points."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from builders import SIMULATED

import dstack_lab as lab

BATCHES, SHARES = (1, 2, 4, 8, 16), (10.0, 20.0, 40.0, 60.0, 80.0, 100.0)
GRID = np.array([(b, g) for b in BATCHES for g in SHARES])


@pytest.fixture(scope="module")
def kernel_model():
    network = lab.zoo.load("resnet18", device="meta")
    return lab.kernel_model.KernelModel(lab.kernels.of_module(network.module, network.example), lab.gpu_specs.V100)


def another_gpu(kernel_model, batch, share):
    """A device the model does not know: slower throughout, with a longer serial part."""
    return 1.6 * np.asarray(kernel_model.predict(batch, share)) + 0.8


def test_a_few_points_correct_the_kernel_models_shape(kernel_model):
    points = [(1, 100.0), (16, 100.0), (4, 20.0)]
    rows = [{"model": "net", "batch": b, "gpu_pct": g, "service_ms": float(another_gpu(kernel_model, b, g))} for b, g in points]
    measured = lab.Profile(pd.DataFrame(rows), SIMULATED, strict=False)
    truth = another_gpu(kernel_model, GRID[:, 0].astype(int), GRID[:, 1])

    def error(model) -> float:
        return float(np.median(np.abs(model.predict(GRID[:, 0], GRID[:, 1]) / truth - 1)))

    corrected = lab.fit(measured, "net", prior=kernel_model.predict)
    alone = lab.fit(measured, "net")
    uncorrected = float(np.median(np.abs(kernel_model.predict(GRID[:, 0].astype(int), GRID[:, 1]) / truth - 1)))
    assert error(corrected) < 0.06
    assert error(corrected) < error(alone)
    assert error(corrected) < uncorrected / 4
