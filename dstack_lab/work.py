"""What a policy has asked to be computed beside a run's loop, and what came of it."""

from __future__ import annotations

from typing import Any


class WorkLost(RuntimeError):
    """The process that worked on something died, and so did the one that tried again."""


class Work:
    """Something that `GpuState.apart` was asked for; plain values only, so that a policy that holds one can be copied.

    Attributes
    ----------
    done : bool
        Whether it has come to its end. It turns true between two turns of a policy, never within one.
    """

    __slots__ = ("_error", "_value", "done")

    def __init__(self) -> None:
        self.done = False
        self._value: Any = None
        self._error: Exception | None = None

    def result(self) -> Any:
        """Return what the function returned, or raise what it raised.

        Raises
        ------
        RuntimeError
            If it is not `done`.
        WorkLost
            If the process that worked on it died twice.
        """
        if not self.done:
            raise RuntimeError("this work is not done: look at `done` before asking for its result")
        if self._error is not None:
            raise self._error
        return self._value

    def end(self, value: Any = None, error: Exception | None = None) -> None:
        """For engines: it has come to its end."""
        self.done, self._value, self._error = True, value, error
