"""Graded exercises of the course: ``check_*`` take an answer and return a `Verdict`."""

from dstack_lab.exercises.base import Mistake, Verdict
from dstack_lab.exercises.batches import check_bound, check_infeasible, check_largest_batch, check_operating_point
from dstack_lab.exercises.knees import check_knee, check_smi_utilization, check_wave_knee, check_waves
from dstack_lab.exercises.queues import check_load, check_rate_for_wait, check_wait
from dstack_lab.exercises.sharing import check_beside, check_slices

__all__ = [
    "Mistake",
    "Verdict",
    "check_beside",
    "check_bound",
    "check_infeasible",
    "check_knee",
    "check_largest_batch",
    "check_load",
    "check_operating_point",
    "check_rate_for_wait",
    "check_slices",
    "check_smi_utilization",
    "check_wait",
    "check_wave_knee",
    "check_waves",
]
