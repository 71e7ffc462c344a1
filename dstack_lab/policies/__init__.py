"""Schedulers, one file per system; each is a plain object that `simulate` and `run` accept."""

from dstack_lab.policies.adaptive import AdaptiveDStack
from dstack_lab.policies.base import Decision, Drop, GpuState, Launch, Policy, Running, ServiceView, Wake
from dstack_lab.policies.clipper import Clipper
from dstack_lab.policies.dstack import DStack
from dstack_lab.policies.gpulet import Gpulet
from dstack_lab.policies.greedy import MaxMin, MaxThroughput
from dstack_lab.policies.gslice import Gslice
from dstack_lab.policies.ideal import Ideal
from dstack_lab.policies.nexus import Nexus
from dstack_lab.policies.slot_plan import cut_slots, try_slots
from dstack_lab.policies.temporal import Temporal
from dstack_lab.policies.triton import Triton
from dstack_lab.policies.uncontrolled import Uncontrolled
from dstack_lab.policies.windows import PeriodPlan, Window, plan_period

__all__ = [
    "AdaptiveDStack",
    "Clipper",
    "DStack",
    "Decision",
    "Drop",
    "GpuState",
    "Gpulet",
    "Gslice",
    "Ideal",
    "Launch",
    "MaxMin",
    "MaxThroughput",
    "Nexus",
    "PeriodPlan",
    "Policy",
    "Running",
    "ServiceView",
    "Temporal",
    "Triton",
    "Uncontrolled",
    "Wake",
    "Window",
    "cut_slots",
    "plan_period",
    "try_slots",
]
