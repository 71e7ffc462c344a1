"""The notebooks run, and give what is saved in them; the builder writes what the checks accept."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
from test_notebooks_guard import NOTEBOOKS, PATHS, PLOTLY, WIDGET_VIEW, problems

if TYPE_CHECKING:  # imported in functions: it takes seconds, and `make quick` reads this file too
    from nbformat import NotebookNode

pytestmark = pytest.mark.slow
ROOT = NOTEBOOKS.parent

SPEC = importlib.util.spec_from_file_location("build", NOTEBOOKS / "build.py")
builder = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(builder)


def nbval(path: Path, scratch: Path, library: Path | None = None) -> SimpleNamespace:
    """Run a notebook in a new kernel and compare every cell; a process of its own, as nbval makes pytest start slowly.

    `library` holds another copy of the package, to be imported in place of this one.
    """
    options = "-q -p no:cacheprovider -p conftest -p nbval.plugin --nbval --nbval-current-env"
    options += " --nbval-cell-timeout 120 --nbval-kernel-startup-timeout 120"
    environment = os.environ | {
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # only what `options` name
        "IPYTHONDIR": str(scratch),  # not the reader's own start-up files
        "JUPYTER_RUNTIME_DIR": str(scratch),
        "PYTHONPATH": os.pathsep.join(map(str, [*([library] if library else []), Path(__file__).parent])),  # for `-p conftest`
    }
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            *options.split(),
            "--nbval-sanitize-with",
            ROOT / "tests" / "nbval_sanitize.cfg",
            "--rootdir",
            path.parent,
            "-c",
            ROOT / "pyproject.toml",
            path,
        ],
        cwd=library or ROOT,  # where the kernel looks for the package first
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    passed = re.search(r"(\d+) passed", done.stdout)
    return SimpleNamespace(passed=int(passed[1]) if passed and done.returncode == 0 else 0, text=done.stdout)


def code_cells(path: Path) -> int:
    return sum(cell["cell_type"] == "code" for cell in json.loads(path.read_text(encoding="utf-8"))["cells"])


@pytest.fixture(scope="session")
def results(request, tmp_path_factory):
    """Function from path to result. Alone, this process runs the selected notebooks two at a time, and the function waits.

    A notebook keeps one core busy, and many cells wait.
    """
    if hasattr(request.config, "workerinput"):  # another process runs the next one meanwhile
        yield lambda path: nbval(path, tmp_path_factory.mktemp("ipython"))
        return
    chosen = [item.callspec.params["path"] for item in request.session.items if getattr(item, "originalname", "") == RUNS]
    with ThreadPoolExecutor(max_workers=2) as pool:
        futures = {path: pool.submit(nbval, path, tmp_path_factory.mktemp("ipython")) for path in chosen}
        yield lambda path: futures[path].result()
        pool.shutdown(cancel_futures=True)  # what nobody waits for after a first failure


RUNS = "test_notebook_gives_what_is_saved"


@pytest.mark.parametrize("path", PATHS, ids=lambda path: str(path.relative_to(NOTEBOOKS)))
def test_notebook_gives_what_is_saved(path, results):
    result = results(path)
    assert result.passed == code_cells(path), result.text


def small(*sources: str) -> NotebookNode:
    """A notebook that was never run."""
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

    notebook = new_notebook(cells=[new_markdown_cell("# Does the builder work?")])
    for source in sources:
        notebook.cells += [new_markdown_cell("See:"), new_code_cell(source)]
    return notebook


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A notebook with text, a table, a widget, a figure, an error and a time, as the builder saves it."""
    import nbformat

    path = tmp_path_factory.mktemp("notebooks") / "00_small.ipynb"
    notebook = small(
        "import time\n\nimport ipywidgets\nimport pandas as pd\nimport plotly.graph_objects as go\n\nimport dstack_lab as lab",
        "lab.Poisson(rate_rps=400)",
        "pd.DataFrame({'gpu_pct': [25, 50], 'service_ms': [8.0, 4.5]})",
        "slider = ipywidgets.IntSlider(description='GPU%')\nslider",
        "go.Figure(go.Scatter(y=[1, 2]))",
        "lab.Poisson(rate_rps=-1)",
        "took = f'{time.perf_counter()} ms'\nprint(f'measured: {took}')\nprint(lab.Provenance('measured', took, 'core sets'))",
    )
    notebook.cells[10].metadata.tags = ["nbval-ignore-output"]
    notebook.cells[12].metadata.tags = ["raises-exception"]
    nbformat.write(notebook, path)
    builder.build(path)
    return path


def test_builder_keeps_the_rules(built):
    import nbformat

    notebook = json.loads(built.read_text())
    assert problems(notebook) == []
    assert notebook["cells"][10]["metadata"] == {"tags": ["nbval-ignore-output"]}
    assert "version" not in notebook["metadata"]["language_info"]
    assert [path.name for path in built.parent.iterdir()] == [built.name]  # nothing half-written is left
    nbformat.validate(nbformat.read(built, as_version=4))


def test_built_notebook_passes_nbval(built, tmp_path):
    result = nbval(built, tmp_path)
    assert result.passed == 7, result.text


def test_nbval_finds_a_changed_number(built, tmp_path):
    changed = tmp_path / "changed.ipynb"
    changed.write_text(built.read_text().replace("8.0  ", "8.1  ").replace("<td>8.0", "<td>8.1"))
    result = nbval(changed, tmp_path)
    assert result.passed == 0
    assert "1 failed, 6 passed" in result.text


# ---- the checks bite ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lesson(tmp_path_factory):
    """A small notebook of the course's kind: numbers of the library, a panel, the panel driven by assignment."""
    import nbformat

    path = tmp_path_factory.mktemp("course") / "small.ipynb"
    notebook = small(
        "import dstack_lab as lab",
        "lab.fit(lab.load_profile('v100-simulated'), 'resnet50').knee_pct(8, rule='tolerance')",
        "panel = lab.panels.KneeExplorer(models=['resnet50'])\npanel",
        "panel.gpu_pct.value = 30\npanel.facts()",
        "lab.Poisson(rate_rps=400)",
    )
    notebook.cells[6].metadata.tags = ["nbval-ignore-output"]
    nbformat.write(notebook, path)
    builder.build(path)
    return path


@pytest.mark.parametrize(
    ("file", "before", "after", "cells"),
    [
        ("knees.py", "", "", 0),
        ("knees.py", "TOLERANCE = 0.05", "TOLERANCE = 0.2", 2),
        ("panels/base.py", 'control.observe(self._changed, "value")', "pass", 1),
    ],
    ids=["unchanged", "a number", "a callback"],
)
def test_a_changed_library_fails_the_cells_that_show_it(lesson, tmp_path, file, before, after, cells):
    library = tmp_path / "library"  # not IPYTHONDIR itself, which IPython moves to the end of sys.path
    shutil.copytree(ROOT / "dstack_lab", library / "dstack_lab", ignore=shutil.ignore_patterns("__pycache__"))
    (library / "data").symlink_to(ROOT / "data")
    changed = library / "dstack_lab" / file
    text = changed.read_text(encoding="utf-8")
    assert before in text, f"{file} no longer holds what this test changes"
    changed.write_text(text.replace(before, after), encoding="utf-8")
    result = nbval(lesson, tmp_path, library=library)
    assert f"{cells} failed, {5 - cells} passed" in result.text if cells else result.passed == 5, result.text


def test_a_lesson_without_outputs_fails_the_guard(lesson):
    notebook = json.loads(lesson.read_text(encoding="utf-8"))
    assert problems(notebook) == []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell |= {"outputs": [], "execution_count": None}
    assert any("execution counts" in problem for problem in problems(notebook))


def test_builder_leaves_a_failing_notebook_as_it_was(tmp_path):
    import nbformat

    path = tmp_path / "failing.ipynb"
    nbformat.write(small("1 / 0"), path)
    before = path.read_text()
    with pytest.raises(Exception, match="ZeroDivisionError"):
        builder.build(path)
    assert path.read_text() == before


def test_clean_drops_what_does_not_last():
    from nbformat import NotebookNode
    from nbformat.v4 import new_output

    notebook = small("panel")
    notebook.metadata.widgets = {"state": {}}
    notebook.metadata.language_info = {"name": "python", "version": "3.11.7"}
    cell = notebook.cells[-1]
    cell.metadata = NotebookNode(execution=NotebookNode(start="now"), tags=["nbval-ignore-output"])
    cell.execution_count = 9
    cell.outputs = [
        new_output("execute_result", {WIDGET_VIEW: {}, "text/plain": "a panel", "image/png": "AA=="}, execution_count=9),
        new_output("display_data", {PLOTLY: {"data": []}, "image/png": "AA=="}),
        new_output("display_data", {WIDGET_VIEW: {}}),
        new_output("stream", text="30 %\n"),
        new_output("error", ename="ValueError", evalue="no", traceback=["File a/path/of/this/machine.py", "ValueError: no"]),
    ]
    builder.clean(notebook)
    assert notebook.metadata == {"language_info": {"name": "python"}}
    assert cell.metadata == {"tags": ["nbval-ignore-output"]}
    assert cell.execution_count == cell.outputs[0].execution_count == 1
    assert [list(output.get("data", {})) for output in cell.outputs] == [["text/plain", "image/png"], [PLOTLY], [], []]
    assert cell.outputs[-1].traceback == ["ValueError: no"]
