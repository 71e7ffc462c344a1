"""Panels: a question with sliders. Each has `facts()`, `describe()` and one live figure, and reads where no kernel runs.

The only room that imports ipywidgets.
"""

from dstack_lab.panels.batch_planner import BatchPlanner
from dstack_lab.panels.knee_explorer import KneeExplorer
from dstack_lab.panels.live_run import LiveRun
from dstack_lab.panels.model_anatomy import ModelAnatomy
from dstack_lab.panels.policy_race import PolicyRace
from dstack_lab.panels.schedule_explorer import ScheduleExplorer

__all__ = ["BatchPlanner", "KneeExplorer", "LiveRun", "ModelAnatomy", "PolicyRace", "ScheduleExplorer"]
