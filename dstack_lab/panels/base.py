"""What all panels share: controls, one live figure, a line for messages, and words that say what is seen."""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import ipywidgets
import plotly.graph_objects as go

from dstack_lab.checks import require
from dstack_lab.figures import save, style
from dstack_lab.panels import controls
from dstack_lab.panels.live_figure import live, marks, show
from dstack_lab.profiles import Profile, load_profile

_TEXT = "max-width: 800px; line-height: 1.4"


@dataclass(frozen=True, slots=True)
class Look:
    """What a panel shows at one setting of its controls.

    Parameters
    ----------
    facts : dict
        Plain, rounded values.
    words : str
        The same in one or two sentences.
    picture : plotly.graph_objects.Figure
    message : str
        What the reader must know; empty where all is well.
    """

    facts: dict[str, Any]
    words: str
    picture: go.Figure
    message: str = ""


class Panel:
    """Base of all panels; a subclass makes its controls and says what they look like (`_look`).

    Set a control's ``value``, in the browser or in code, and `facts`, `describe` and the figure follow. What goes
    wrong is said in the panel's line of messages and in ``facts()["message"]``, and the panel goes on.

    Attributes
    ----------
    strict : bool
        Whether errors are also raised where a control was set; for tests.
    """

    strict = False

    def __init__(self) -> None:
        self._rows: list[ipywidgets.Widget] = []
        self._watched: dict[str, ipywidgets.Widget] = {}
        self._note = self._lasting = ""
        self._figure: go.FigureWidget | None = None
        self._view: ipywidgets.Widget | None = None
        self._message = ipywidgets.HTML()
        self._words = ipywidgets.HTML()
        self._busy = False

    # --- for subclasses

    def _look(self) -> Look:
        """Compute what to show, from the controls."""
        raise NotImplementedError

    def _choice(self, field: str, label: str, options: Iterable[Any], tooltip: str, value: Any = None) -> controls.Choice:
        """Add a drop-down list."""
        made = controls.choice(field, label, list(options), tooltip, value)
        return self._add(field, made, made)  # type: ignore[no-any-return]

    def _networks(
        self, models: Iterable[str] | str | None, known: Iterable[str], tooltip: str, where: str = "the profile"
    ) -> list[str]:
        """Add the list of networks, `model`; return those on it. Those asked for and not known are named for good."""
        names, self._lasting = offered(models, known, where)
        self.model = self._choice("model", "Network", names, tooltip, "resnet50" if "resnet50" in names else None)
        return names

    def _slider(
        self, field: str, label: str, low: float, high: float, value: float, tooltip: str, **more: Any
    ) -> ipywidgets.Widget:
        """Add a slider with its number box."""
        made = controls.slider(field, low, high, value, tooltip, **more)
        return self._add(field, made, controls.paired(label, made))

    def _add(self, field: str, control: ipywidgets.Widget, row: ipywidgets.Widget) -> ipywidgets.Widget:
        self._watched[field] = control
        self._rows.append(row)
        control.say = self._say
        return control

    def _begin(self) -> None:
        """Connect the controls and draw for the first time; the last line of a subclass's constructor."""
        for control in self._watched.values():
            control.observe(self._changed, "value")
        self._redraw()

    def _changed(self, change: Any) -> None:
        if not self._busy:
            self._redraw()

    def _redraw(self) -> None:
        """Look anew and show it; what fails is said in words."""
        try:
            self._now = self._look()
        except Exception as error:
            self._now = self._failure(error)
            if self.strict:
                raise
        finally:
            self._show()

    def _failure(self, error: Exception) -> Look:
        """What is shown instead of a result."""
        said = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        facts = {name: _plain(control.value) for name, control in self._watched.items()}
        title = f"{type(self).__name__}: nothing to draw"
        return Look(facts, f"{type(self).__name__} cannot show this: {said}.", style.nothing(title, "", said), said)

    def _say(self, words: str) -> None:
        """Take a control's word about the value it was given."""
        if words != self._note:
            self._note = words
            self._show_words()

    def _show(self) -> None:
        if self._figure is not None:
            self._busy, before = True, self._busy  # what is set here is not a reader's zoom
            try:
                show(self._figure, self._now.picture)
            finally:
                self._busy = before
        self._show_words()

    def _show_words(self) -> None:
        said = html.escape(self.message)
        mark = '<b aria-hidden="true">▲</b> ' if said else ""
        self._message.value = (
            f'<div role="status" aria-live="polite" style="max-width: 800px; line-height: 1.4">{mark}{said}</div>'
        )
        if hasattr(self, "_now"):
            self._words.value = f'<p style="max-width: 800px; line-height: 1.4">{html.escape(self.describe())}</p>'

    # --- for readers

    @property
    def message(self) -> str:
        """What the reader must know: a value out of range, an error; empty where all is well."""
        now = self._now.message if hasattr(self, "_now") else ""
        return "; ".join(dict.fromkeys(filter(None, (self._note, self._lasting, now))))

    def facts(self) -> dict[str, Any]:
        """What the panel shows, as a small dict of rounded values; ``drawn`` counts the figure's marks."""
        drawn = self._now.picture if self._figure is None else self._figure
        return {**self._now.facts, "drawn": marks(drawn), "message": self.message}

    def describe(self) -> str:
        """What the panel shows, in words."""
        return self._now.words

    @property
    def figure(self) -> go.FigureWidget:
        """The live figure; made when it is first asked for, which takes a second."""
        if self._figure is None:
            self._figure = live(self._now.picture)
            self._watch_figure(self._figure)
        return self._figure

    def _watch_figure(self, figure: go.FigureWidget) -> None:
        """Hear what a reader does to the figure itself, such as zooming."""

    @property
    def view(self) -> ipywidgets.Widget:
        """Controls, messages, figure and words as one widget."""
        if self._view is None:
            self._view = ipywidgets.VBox([*self._rows, self._message, self.figure, self._words])
        return self._view

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, Any]:
        """Live where a kernel runs; elsewhere, as on GitHub, a picture and words."""
        bundle: dict[str, Any] = self.view._repr_mimebundle_()
        bundle["text/plain"] = self.describe()
        out = io.BytesIO()
        save(self._now.picture, out)
        bundle["image/png"] = base64.b64encode(out.getvalue()).decode()
        return bundle

    def __repr__(self) -> str:
        return self.describe()


def as_profile(profile: Profile | str | os.PathLike[str]) -> Profile:
    """Return a Profile, loaded if `profile` is its name or path."""
    return load_profile(profile) if isinstance(profile, (str, os.PathLike)) else _profile(profile)


def _profile(profile: object) -> Profile:
    require(isinstance(profile, Profile), "profile", type(profile).__name__, "a Profile, or the name or path of one")
    return profile  # type: ignore[return-value]


def offered(models: Iterable[str] | str | None, known: Iterable[str], where: str = "the profile") -> tuple[list[str], str]:
    """Networks to offer, and a sentence about those that are asked for and not known.

    Returns
    -------
    names : list of str
        Never empty: all that are known where none of `models` is.
    words : str
    """
    known = list(known)
    if models is None:
        return known, ""
    asked = [models] if isinstance(models, str) else list(models)
    found = [name for name in asked if name in known]
    missing = [str(name) for name in asked if name not in known]
    if not missing and found:
        return found, ""
    return found or known, f"{', '.join(missing) or 'no network'} is not in {where}, which holds {', '.join(known)}"


def _plain(value: Any) -> Any:
    return round(value, 3) if isinstance(value, float) else value
