"""Run notebooks in place and save them with their outputs: `python notebooks/build.py [paths]`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dstack_lab.files import whole_file

if TYPE_CHECKING:
    from nbformat import NotebookNode

HERE = Path(__file__).parent
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
PLOTLY = "application/vnd.plotly.v1+json"
CELL_TIMEOUT_S = 600


def clean(notebook: NotebookNode) -> NotebookNode:
    """Drop, in place, what changes from run to run or weighs megabytes; code, tags and readable outputs stay."""
    notebook.metadata.pop("widgets", None)  # 5 MB for each live figure
    notebook.metadata.get("language_info", {}).pop("version", None)
    executed = 0
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # wall-clock times
        if cell.cell_type != "code":
            continue
        executed += 1
        cell.execution_count = executed
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = executed
            data: dict[str, Any] = output.get("data", {})
            data.pop(WIDGET_VIEW, None)  # the id of a widget that no longer exists
            if PLOTLY in data:
                data.pop("image/png", None)  # the same picture once more
            if output.output_type == "error":
                output.traceback = [f"{output.ename}: {output.evalue}"]  # the rest holds paths of this machine
        cell.outputs = [output for output in cell.outputs if output.get("data", True)]
    return notebook


def build(path: Path) -> None:
    """Run one notebook from its own folder and replace it by the result; a failing cell leaves the file as it was."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    # With store_widget_state=False, nbclient fails on any Output widget; `clean` drops the state again.
    client = NotebookClient(
        notebook, timeout=CELL_TIMEOUT_S, store_widget_state=True, resources={"metadata": {"path": str(path.parent)}}
    )
    client.execute()
    with whole_file(path) as part:
        nbformat.write(clean(notebook), part)


def main(paths: list[str]) -> None:
    """Build the given notebooks, or all."""
    for path in map(Path, paths) if paths else sorted([*HERE.glob("*.ipynb"), *HERE.glob("solutions/*.ipynb")]):
        print(path, flush=True)
        build(path)


if __name__ == "__main__":
    main(sys.argv[1:])
