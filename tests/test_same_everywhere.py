"""Another processor's linear algebra: the same service times, rates, plans and results to the last bit."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

RESULTS = """
import dstack_lab as lab
from dstack_lab.bounds import service_tables
from dstack_lab.trials import plan_for

known = lab.load_profile("v100-simulated")
for load in (0.8, 1.0):  # at 1 the services ask for the whole GPU: who asks for more is cut short, and sums round
    services = lab.workload("C-4", known, load=load)
    print([s.rate_rps.hex() for s in services])
    for table in service_tables(services, known):
        print([table.at(batch, share).hex() for batch in (1, 2, 8) for share in range(5, 101, 5)])
    print(lab.cut_slots(plan_for(services, known, "efficacy")))
print(lab.fit(known, "resnet50").knee(4))
"""


@pytest.mark.slow
def test_results_do_not_depend_on_the_processor():
    """OpenBLAS and NumPy have code for each kind of processor, whose sums round in other orders."""
    plain = {"OPENBLAS_CORETYPE": "Prescott", "NPY_DISABLE_CPU_FEATURES": _features()}
    own, other = (
        subprocess.run([sys.executable, "-c", RESULTS], env=os.environ | more, check=True, capture_output=True, text=True).stdout
        for more in ({}, plain)
    )
    assert own == other


def _features() -> str:
    """What NumPy was told to use beyond its baseline here; it refuses the name of anything else."""
    from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__

    return " ".join(name for name in __cpu_dispatch__ if __cpu_features__[name])
