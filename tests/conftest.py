"""What all tests share."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

# A parser that jsonschema builds for a check nobody needs here, in more than a second (see figures/light_import.py).
sys.modules.setdefault("rfc3987_syntax", None)

# Examples are timed by hypothesis, and a busy machine is slow without being wrong.
# On a CI server the examples are the same every time: a change is judged there, luck is not; elsewhere they are new.
settings.register_profile("dstack_lab", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("dstack_lab")


def pytest_configure(config: pytest.Config) -> None:
    """Spare nbval the pretty-printing of each message (5 MB for a FigureWidget) into a debug log that nobody reads."""
    if config.pluginmanager.has_plugin("nbval.plugin"):
        import nbval.kernel

        nbval.kernel.pformat = lambda *args, **kwargs: ""


#: Files that take longest: where several processes share the tests, these begin first.
LONGEST = (
    "browser",
    "notebooks",
    "exercises",
    "agenda",
    "compiled",
    "exercises_policies",
    "runner",
    "mps",
    "experiments",
    "live_run",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where several processes share the tests, begin with what takes longest."""
    if hasattr(config, "workerinput"):
        rank = {f"test_{name}": number for number, name in enumerate(LONGEST)}
        items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Keep a file in one process, with its fixtures; notebooks may part."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return nodeid if "::test_notebook_gives_what_is_saved[" in nodeid else super()._split_scope(nodeid)

    return Scheduling(config, log)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of published measurements to compare with; it is not part of the repository."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("published measurements are not at hand (../shared/data)")
    return folder
