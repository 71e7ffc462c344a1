"""Schedulers, one file per system; each is a plain object that `simulate` and `run` accept."""

from dstack_lab.policies.base import Decision, Drop, GpuState, Launch, Policy, Running, ServiceView, Wake
from dstack_lab.policies.dstack import DStack
from dstack_lab.policies.temporal import Temporal

__all__ = ["DStack", "Decision", "Drop", "GpuState", "Launch", "Policy", "Running", "ServiceView", "Temporal", "Wake"]
