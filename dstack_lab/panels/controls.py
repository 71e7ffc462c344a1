"""Controls that say in words what they do not accept, each with a name that a screen reader finds.

A slider's handle has no label in JupyterLab, so every slider stands beside a number box that does;
the browser keeps the two equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets
from traitlets import TraitError, validate

from dstack_lab.figures.style import COLORS

#: Called with a sentence when a control takes another value than it was given, with "" when it takes one as it is.
Say = Callable[[str], None]

_BOX = ipywidgets.Layout(width="250px")
_LIST = ipywidgets.Layout(width="370px")
_SLIDER = ipywidgets.Layout(width="300px")
_STYLE = {"description_width": "150px"}
_HANDLE = {"handle_color": COLORS[0]}  # JupyterLab's own is white on white


class _Bounded:
    """Mixed into a slider: a value beyond its range becomes the nearest one inside, and a sentence."""

    field = ""
    say: Say | None = None

    @validate("value")
    def _validate_value(self, proposal: Any) -> Any:
        value = proposal["value"]
        low, high = self.range()
        kept = min(max(self.tidy(value), low), high)
        if self.say is not None:
            words = f"{self.field} = {value:g}: must be from {low:g} to {high:g}; took {kept:g}"
            self.say("" if low <= value <= high else words)
        return kept

    def tidy(self, value: Any) -> Any:
        """Free a value of what the browser's arithmetic left on it."""
        return value

    def range(self) -> tuple[float, float]:
        """Smallest and largest value."""
        return self.min, self.max  # type: ignore[attr-defined]


class WholeSlider(_Bounded, ipywidgets.IntSlider):
    """Slider over whole numbers."""


class NumberSlider(_Bounded, ipywidgets.FloatSlider):
    """Slider over numbers."""

    def tidy(self, value: Any) -> Any:
        """A browser's 55.00000000000001 is 55."""
        return float(f"{value:.10g}")


class LogSlider(_Bounded, ipywidgets.FloatLogSlider):
    """Slider over numbers of very different size."""

    def range(self) -> tuple[float, float]:
        """Smallest and largest value; `min` and `max` are exponents."""
        return self.base**self.min, self.base**self.max

    def tidy(self, value: Any) -> Any:
        """Where the handle can stand, numbers are round: 10 ** 2.6 is 398. Any other number stays."""
        steps = math.log(value, self.base) / self.step if value > 0 else 0.5
        return float(f"{value:.3g}" if abs(steps - round(steps)) < 1e-9 else f"{value:.10g}")


class Choice(ipywidgets.Dropdown):
    """Drop-down list that names what it offers when it is given something else."""

    field = ""
    say: Say | None = None

    @validate("value")
    def _validate_value(self, proposal: Any) -> Any:
        value = proposal.value
        if value is not None and value not in self._options_values:
            offered = ", ".join(map(str, self._options_labels))
            words = f"{self.field} = {value!r}: must be one of {offered}"
            if self.say is not None:
                self.say(words)
            raise TraitError(words)
        if self.say is not None:
            self.say("")
        return value


def choice(field: str, label: str, options: Sequence[Any], tooltip: str, value: Any = None) -> Choice:
    """Make a drop-down list of `options`, plain values or (words, value) pairs."""
    made = Choice(
        options=list(options), description=label, tooltip=tooltip, style=_STYLE, layout=ipywidgets.Layout(width="370px")
    )
    if value is not None:
        made.value = value
    made.field = field
    return made


def slider(
    field: str,
    low: float,
    high: float,
    value: float,
    tooltip: str,
    *,
    step: float = 1,
    log: bool = False,
    live: bool = True,
) -> ipywidgets.Widget:
    """Make a slider.

    Parameters
    ----------
    field : str
        Name of the panel's attribute, for messages.
    low, high, value : float
        Whole numbers make a slider over whole numbers.
    tooltip : str
        What it is for.
    step : float
        Of the slider; with `log`, in powers of ten.
    log : bool
        Whether the slider is logarithmic.
    live : bool
        Whether a slider over whole numbers reports while it is dragged, or once it is let go: for panels that
        simulate. Others always wait, or the browser would move what code or the number box sets to the next step.
    """
    whole = not log and all(isinstance(x, int) for x in (low, high, value, step))
    shared = {"readout": False, "tooltip": tooltip, "layout": _SLIDER, "style": _HANDLE, "continuous_update": live and whole}
    if log:
        made: Any = LogSlider(min=math.log10(low), max=math.log10(high), value=value, step=step, **shared)
    elif whole:
        made = WholeSlider(min=low, max=high, value=value, step=step, **shared)
    else:
        made = NumberSlider(min=low, max=high, value=value, step=step, **shared)
    made.field = field
    return made


def paired(label: str, control: ipywidgets.Widget) -> ipywidgets.HBox:
    """Return the row of a slider: a labelled number box and the slider, which the browser keeps equal."""
    shared = {"description": label, "tooltip": control.tooltip, "style": _STYLE, "layout": _BOX}
    if isinstance(control, WholeSlider):
        box: Any = ipywidgets.BoundedIntText(
            value=control.value, min=control.min, max=control.max, step=control.step, continuous_update=False, **shared
        )
    else:
        low, high = control.range()
        box = ipywidgets.BoundedFloatText(value=control.value, min=low, max=high, continuous_update=False, **shared)
        box.step = None if isinstance(control, LogSlider) else control.step
    ipywidgets.jslink((control, "value"), (box, "value"))
    if not isinstance(control, LogSlider):  # a range that the panel changes later
        for end in ("min", "max"):
            ipywidgets.dlink((control, end), (box, end))
    return ipywidgets.HBox([box, control])
