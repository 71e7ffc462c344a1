"""Figures: data -> plotly Figure, with units on every axis and the provenance in every subtitle.

`save` writes any of them as PNG or SVG, byte for byte the same on every run.
"""

from dstack_lab.figures import light_import  # noqa: F401  # before all others, which import plotly

# isort: split
from dstack_lab.figures.anatomies import anatomy
from dstack_lab.figures.choices import choices, choose
from dstack_lab.figures.costs import batches
from dstack_lab.figures.curves import knee
from dstack_lab.figures.latencies import latency
from dstack_lab.figures.paper import save
from dstack_lab.figures.periods import period
from dstack_lab.figures.placements import placement
from dstack_lab.figures.plans import plan
from dstack_lab.figures.progress import PANES, Progress, progress, replay
from dstack_lab.figures.queues import waits
from dstack_lab.figures.races import comparison
from dstack_lab.figures.slot_trials import slots
from dstack_lab.figures.space import place, raster
from dstack_lab.figures.style import COLORS, CONFIG, cues, quiet_mode_bar
from dstack_lab.figures.sweeps import gains, loads
from dstack_lab.figures.timelines import EXACT, timeline

__all__ = [
    "COLORS",
    "CONFIG",
    "EXACT",
    "PANES",
    "Progress",
    "anatomy",
    "batches",
    "choices",
    "choose",
    "comparison",
    "cues",
    "gains",
    "knee",
    "latency",
    "loads",
    "period",
    "place",
    "placement",
    "plan",
    "progress",
    "raster",
    "replay",
    "save",
    "slots",
    "timeline",
    "waits",
]

quiet_mode_bar()
