"""Graded exercises of the course: ``check_*`` take an answer and return a `Verdict`."""

from dstack_lab.exercises.base import Mistake, Verdict
from dstack_lab.exercises.batches import check_bound, check_infeasible, check_largest_batch, check_operating_point
from dstack_lab.exercises.cluster import check_assignment, check_fewest_gpus
from dstack_lab.exercises.knees import check_knee, check_smi_utilization, check_wave_knee, check_waves
from dstack_lab.exercises.own_policy import check_beats, check_fair, check_policy
from dstack_lab.exercises.queues import check_load, check_rate_for_wait, check_wait
from dstack_lab.exercises.races import check_baseline_wins, check_interval
from dstack_lab.exercises.reality import check_error, check_scatter, scatter_puzzle
from dstack_lab.exercises.schedules import check_broken_periods, check_jain, check_worst_latency, period_puzzle
from dstack_lab.exercises.sharing import check_beside, check_slices

__all__ = [
    "Mistake",
    "Verdict",
    "check_assignment",
    "check_baseline_wins",
    "check_beats",
    "check_beside",
    "check_bound",
    "check_broken_periods",
    "check_error",
    "check_fair",
    "check_fewest_gpus",
    "check_infeasible",
    "check_interval",
    "check_jain",
    "check_knee",
    "check_largest_batch",
    "check_load",
    "check_operating_point",
    "check_policy",
    "check_rate_for_wait",
    "check_scatter",
    "check_slices",
    "check_smi_utilization",
    "check_wait",
    "check_wave_knee",
    "check_waves",
    "check_worst_latency",
    "period_puzzle",
    "scatter_puzzle",
]
