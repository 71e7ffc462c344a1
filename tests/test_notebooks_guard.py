"""Rules for committed notebooks that running them does not check, and proof that each rule bites.

nbval runs a cell without an execution count but compares nothing, so an emptied notebook passes it;
these rules look at the file alone and need no kernel.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
PATHS = sorted([*NOTEBOOKS.glob("*.ipynb"), *NOTEBOOKS.glob("solutions/*.ipynb")])

MAX_BYTES = 300_000
MAX_CODE_CELLS = 25
MAX_LINES = 12
MIN_CHECKED = 3
MAX_POINTS = 4
SECTIONS = ("Where it breaks", "Key points", "Exercises")
IGNORED, RAISES = "nbval-ignore-output", "raises-exception"
TAGS = {IGNORED, RAISES}
PLOTLY = "application/vnd.plotly.v1+json"
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
NOT_COMPARED = {"image/png", "image/jpeg", WIDGET_VIEW}

#: What a line of code must not hold -> why.
FORBIDDEN = {
    r"NBVAL_": "holds an NBVAL_ comment; use a tag, which readers do not see",
    r";\s*(#.*)?$": "ends with ';', which nbval runs differently",
    r"^\s*!|=\s*!\s*[a-z]": "runs a shell command, whose failure nobody notices",
    r"^\s*%": "uses a magic command",
    r"\.\./": "leaves its folder ('../')",
    r"""["'](~?/|[A-Za-z]:[\\/])""": "holds an absolute path",
}
MACHINE_PATH = re.compile(r"(?<![\w.:/])/(home|root|tmp|Users|work|usr|opt|mnt)/")

Notebook = dict[str, Any]
Cell = dict[str, Any]


def text(lines: str | list[str]) -> str:
    """Text of a notebook field, which is one string or a list of lines."""
    return lines if isinstance(lines, str) else "".join(lines)


def tags(cell: Cell) -> set[str]:
    return set(cell["metadata"].get("tags", []))


def is_checked(cell: Cell) -> bool:
    """Whether nbval compares anything of this cell."""
    return IGNORED not in tags(cell) and any(
        output["output_type"] == "stream" or output.get("data", {}).keys() - NOT_COMPARED for output in cell["outputs"]
    )


def problems_of_source(source: str) -> list[str]:
    found = [why for pattern, why in FORBIDDEN.items() if re.search(pattern, source, re.MULTILINE)]
    if not source.strip():
        found.append("is empty")
    if (lines := len(source.splitlines())) > MAX_LINES:
        found.append(f"has {lines} lines; at most {MAX_LINES}")
    return found


def problems_of_outputs(cell: Cell) -> list[str]:
    found = []
    outputs = cell["outputs"]
    raised = any(output["output_type"] == "error" for output in outputs)
    if raised and RAISES not in tags(cell):
        found.append(f"shows an error without tag {RAISES}")
    if RAISES in tags(cell) and not raised:
        found.append(f"has tag {RAISES} and shows no error")
    if IGNORED in tags(cell) and not outputs:
        found.append(f"has tag {IGNORED} and no output")
    for output in outputs:
        data = output.get("data", {})
        if output.get("name") == "stderr":
            found.append("writes to stderr")
        if WIDGET_VIEW in data:
            found.append("refers to a widget that is not saved")
        if PLOTLY in data and not data[PLOTLY].get("data"):
            found.append("draws a figure with nothing in it")
        if PLOTLY in data and IGNORED not in tags(cell):
            found.append(f"draws a figure without tag {IGNORED}")
        shown = [text(output.get("text", "")), text(data.get("text/plain", "")), text(data.get("text/html", ""))]
        shown += output.get("traceback", [])
        if any(map(MACHINE_PATH.search, shown)):
            found.append("shows a path of the machine it ran on")
    return found


def problems(notebook: Notebook) -> list[str]:
    """All that is wrong with a notebook, one sentence each; cells are numbered as in the file, from 0."""
    cells = notebook["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    found = []
    if "widgets" in notebook["metadata"]:
        found.append("holds widget state")
    if (size := len(json.dumps(notebook, indent=1, ensure_ascii=False).encode())) >= MAX_BYTES:
        found.append(f"has {size} bytes; fewer than {MAX_BYTES}")
    if not cells or cells[0]["cell_type"] != "markdown" or not text(cells[0]["source"]).startswith("# "):
        found.append("does not begin with a title")
    if [cell["execution_count"] for cell in code] != list(range(1, len(code) + 1)):
        found.append("was not run from top to bottom: execution counts are not 1, 2, 3, ...")
    if len(code) > MAX_CODE_CELLS:
        found.append(f"has {len(code)} code cells; at most {MAX_CODE_CELLS}")
    if sum(map(is_checked, code)) < MIN_CHECKED:
        found.append(f"has fewer than {MIN_CHECKED} cells whose output is compared")
    if not code or "import dstack_lab as lab" not in text(code[0]["source"]).splitlines():
        found.append("does not say `import dstack_lab as lab` in its first code cell")
    if any(re.search(r"^(import|from)\s", text(cell["source"]), re.MULTILINE) for cell in code[1:]):
        found.append("imports after its first code cell")
    for number, (before, cell) in enumerate(pairwise(cells), start=1):
        if cell["cell_type"] == "code" and (before["cell_type"] != "markdown" or not text(before["source"]).strip()):
            found.append(f"cell {number} has no markdown before it")
    exercise = 0  # level of the heading that says so, 0 outside exercises
    for number, cell in enumerate(cells):
        source = text(cell["source"])
        if cell["cell_type"] == "markdown":
            for marks, heading in re.findall(r"^(#+) (.*)$", source, re.MULTILINE):
                if not exercise or len(marks) <= exercise:
                    exercise = len(marks) if "exercise" in heading.lower() else 0
            if unknown := tags(cell):
                found.append(f"cell {number} is markdown and has tags {sorted(unknown)}")
            continue
        here = problems_of_source(source) + problems_of_outputs(cell)
        if re.search(r"^(async )?(def|class) ", source, re.MULTILINE) and not exercise:
            here.append("defines something outside an exercise")
        if unknown := tags(cell) - TAGS:
            here.append(f"has unknown tags {sorted(unknown)}")
        found += [f"cell {number} {what}" for what in here]
    return found


def problems_of_lesson(notebook: Notebook) -> list[str]:
    """What a notebook of the course lacks beside `problems`: its closing sections, in their order."""
    prose = "\n".join(text(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown")
    headings = re.findall(r"^## (.*)$", prose, re.MULTILINE)
    found = [f"has no section '{name}'" for name in SECTIONS if headings.count(name) != 1]
    if not found and sorted(SECTIONS, key=headings.index) != list(SECTIONS):
        found.append(f"does not end in the order {', '.join(SECTIONS)}")
    points = re.search(r"^## Key points\n(.*?)(?=^#|\Z)", prose, re.MULTILINE | re.DOTALL)
    number = len(re.findall(r"^[-*] ", points[1], re.MULTILINE)) if points else 0
    if not 1 <= number <= MAX_POINTS:
        found.append(f"has {number} key points; 1 to {MAX_POINTS}")
    code = "\n".join(text(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code")
    if not re.search(r"\bexercises\.check_\w+\(", code):
        found.append("has no graded exercise")
    last = text(notebook["cells"][-1]["source"]) if notebook["cells"] else ""
    if not (re.search(r"^(## Next$|\*\*Next\*\*)", last, re.MULTILINE) and re.search(r"\]\([\w./]+\)", last)):
        found.append("does not end with a link to what is next")
    return found


def dead_links(path: Path) -> list[str]:
    """Files that a notebook or page links to and that are not there."""
    prose = path.read_text(encoding="utf-8")
    return [link for link in re.findall(r"\]\(([\w./-]+)\)", prose) if not (path.parent / link).exists()]


def test_the_tour_exists():
    assert (NOTEBOOKS / "00_tour.ipynb").is_file()


@pytest.mark.parametrize("path", PATHS, ids=lambda path: str(path.relative_to(NOTEBOOKS)))
def test_notebook_keeps_the_rules(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert problems(notebook) == []
    assert path.stat().st_size < MAX_BYTES
    assert dead_links(path) == []


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.name)
def test_lesson_has_its_closing_sections(path):
    assert problems_of_lesson(json.loads(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.name)
def test_lesson_has_solutions_and_a_place_in_the_plan(path):
    assert (NOTEBOOKS / "solutions" / path.name).is_file()
    assert f"({path.name})" in (NOTEBOOKS / "README.md").read_text(encoding="utf-8")


def test_lesson_plan_links_to_what_is_there():
    assert dead_links(NOTEBOOKS / "README.md") == []


# ---- the rules bite -------------------------------------------------------------------------------------------------


def markdown(source: str) -> Cell:
    return {"cell_type": "markdown", "metadata": {}, "source": source}


def code(number: int, source: str, data: dict[str, Any] | None = None, *names: str) -> Cell:
    outputs = [] if data is None else [{"output_type": "execute_result", "execution_count": number, "metadata": {}, "data": data}]
    return {
        "cell_type": "code",
        "execution_count": number,
        "metadata": {"tags": list(names)} if names else {},
        "outputs": outputs,
        "source": source,
    }


ERROR = {"output_type": "error", "ename": "ValueError", "evalue": "", "traceback": []}
STDERR = {"output_type": "stream", "name": "stderr", "text": ["a warning\n"]}


def good() -> Notebook:
    """Small notebook that keeps all rules: cells 0 to 11, code in the odd ones."""
    return {
        "cells": [
            markdown("# How much GPU does a network need?"),
            code(1, "import numpy as np\n\nimport dstack_lab as lab"),
            markdown("A number."),
            code(2, "1 + 1", {"text/plain": "2"}),
            markdown("A table."),
            code(3, "[1, 2]", {"text/plain": "[1, 2]"}),
            markdown("A figure."),
            code(4, "lab.figures.knee(fit)", {PLOTLY: {"data": [{"y": [1]}]}}, IGNORED),
            markdown("An error."),
            code(5, "lab.Poisson(0)", None, RAISES) | {"outputs": [ERROR]},
            markdown("## Exercises\n### Which share?"),
            code(6, "def answer():\n    return 30\n\n\nanswer()", {"text/plain": "30"}),
        ],
        "metadata": {"language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def source(number: int, new: str) -> Callable[[Notebook], None]:
    def change(notebook: Notebook) -> None:
        notebook["cells"][number]["source"] = new

    return change


def output(number: int, *new: dict[str, Any]) -> Callable[[Notebook], None]:
    def change(notebook: Notebook) -> None:
        notebook["cells"][number]["outputs"] = list(new)

    return change


def tagged(number: int, *new: str) -> Callable[[Notebook], None]:
    def change(notebook: Notebook) -> None:
        notebook["cells"][number]["metadata"]["tags"] = list(new)

    return change


def cleared_cell(notebook: Notebook) -> None:
    notebook["cells"][3] |= {"execution_count": None, "outputs": []}


def cleared(notebook: Notebook) -> None:
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell |= {"execution_count": None, "outputs": []}


def swapped(notebook: Notebook) -> None:
    notebook["cells"][3]["execution_count"], notebook["cells"][5]["execution_count"] = 3, 2


def widget_state(notebook: Notebook) -> None:
    notebook["metadata"]["widgets"] = {}


def no_markdown(notebook: Notebook) -> None:
    del notebook["cells"][4]


def many_cells(notebook: Notebook) -> None:
    for number in range(7, 27):
        notebook["cells"] += [markdown("More."), code(number, "1", {"text/plain": "1"})]


def shows(**data: Any) -> dict[str, Any]:
    return {"output_type": "display_data", "metadata": {}, "data": data}


BROKEN: list[tuple[Callable[[Notebook], None], str]] = [
    (cleared, "execution counts"),
    (cleared, "fewer than 3 cells whose output is compared"),
    (cleared_cell, "execution counts"),
    (swapped, "execution counts"),
    (widget_state, "holds widget state"),
    (output(5, shows(**{"text/plain": "x" * MAX_BYTES})), "bytes; fewer than 300000"),
    (source(0, "How much?"), "does not begin with a title"),
    (many_cells, "has 26 code cells"),
    (tagged(3, IGNORED), "fewer than 3 cells whose output is compared"),
    (output(3, shows(**{"image/png": "iVBOR"})), "fewer than 3 cells whose output is compared"),
    (output(3), "fewer than 3 cells whose output is compared"),
    (source(1, "import numpy as np"), "`import dstack_lab as lab`"),
    (source(1, "import dstack_lab"), "`import dstack_lab as lab`"),
    (source(3, "import numpy as np\n2"), "imports after its first code cell"),
    (no_markdown, "cell 4 has no markdown before it"),
    (source(4, " \n"), "cell 5 has no markdown before it"),
    (source(3, ""), "cell 3 is empty"),
    (source(3, "1\n" * 13), "cell 3 has 13 lines"),
    (source(3, "# NBVAL_SKIP\n2"), "cell 3 holds an NBVAL_ comment"),
    (source(3, "2;"), "cell 3 ends with ';'"),
    (source(3, "2;  # quiet"), "cell 3 ends with ';'"),
    (source(3, "!pip list"), "cell 3 runs a shell command"),
    (source(3, "names = !ls"), "cell 3 runs a shell command"),
    (source(3, "%pip install x"), "cell 3 uses a magic command"),
    (source(3, "%%bash\nfalse"), "cell 3 uses a magic command"),
    (source(3, "%autoreload 2"), "cell 3 uses a magic command"),
    (source(3, "lab.load_profile('../data/x.csv')"), "cell 3 leaves its folder"),
    (source(3, 'lab.load_profile("/data/x.csv")'), "cell 3 holds an absolute path"),
    (source(3, 'lab.load_profile("~/x.csv")'), "cell 3 holds an absolute path"),
    (source(3, "lab.load_profile('C:\\\\x.csv')"), "cell 3 holds an absolute path"),
    (source(3, "def f():\n    return 2\n\n\nf()"), "cell 3 defines something outside an exercise"),
    (source(10, "## Exercises\n## Next"), "cell 11 defines something outside an exercise"),
    (tagged(3, "nbval-skip"), "cell 3 has unknown tags ['nbval-skip']"),
    (tagged(3, "remove-input"), "cell 3 has unknown tags"),
    (tagged(2, "nbval-skip"), "cell 2 is markdown and has tags"),
    (output(3, STDERR), "cell 3 writes to stderr"),
    (output(7, STDERR), "cell 7 writes to stderr"),
    (output(3, ERROR), "cell 3 shows an error without tag"),
    (output(7, ERROR), "cell 7 shows an error without tag"),
    (output(9), "cell 9 has tag raises-exception and shows no error"),
    (output(7), "cell 7 has tag nbval-ignore-output and no output"),
    (tagged(7), "cell 7 draws a figure without tag"),
    (output(7, shows(**{PLOTLY: {"data": []}})), "cell 7 draws a figure with nothing in it"),
    (output(7, shows(**{WIDGET_VIEW: {"model_id": "0"}})), "cell 7 refers to a widget that is not saved"),
    (output(5, shows(**{"text/plain": ["saved to /home/", "someone/x.csv"]})), "cell 5 shows a path of the machine"),
]


def test_a_good_notebook_has_no_problem():
    assert problems(good()) == []


@pytest.mark.parametrize(("change", "sentence"), BROKEN, ids=[f"{i} {sentence}" for i, (_, sentence) in enumerate(BROKEN)])
def test_a_broken_notebook_is_found(change, sentence):
    notebook = good()
    change(notebook)
    assert any(sentence in problem for problem in problems(notebook)), problems(notebook)


@pytest.mark.parametrize(
    "harmless",
    ["a != b", "x = 10 % 3", "'a/b'", "y = f(a) / b", 'print("50 %")', '"; ".join(names)', "service.rate_rps != 3"],
)
def test_harmless_code_passes(harmless):
    notebook = good()
    source(3, harmless)(notebook)
    assert problems(notebook) == []


def lesson() -> Notebook:
    """Small notebook with all that a lesson needs."""
    return {
        "cells": [
            markdown("# How much?\n\n## Where it breaks\nHere."),
            markdown("## Key points\n\n- One.\n- Two.\n\n## Exercises\n\nWhich share?"),
            code(1, "lab.exercises.check_knee(..., fit)", {"text/plain": "Not yet."}),
            markdown("**Next**: [01](01_next.ipynb)"),
        ]
    }


LACKING: list[tuple[Callable[[Notebook], None], str]] = [
    (source(0, "# How much?"), "has no section 'Where it breaks'"),
    (source(0, "# How much?\n### Where it breaks"), "has no section 'Where it breaks'"),
    (source(1, "## Exercises"), "has no section 'Key points'"),
    (source(1, "## Key points\n- One."), "has no section 'Exercises'"),
    (source(1, "## Exercises\n## Key points\n- One."), "does not end in the order"),
    (source(1, "## Key points\n## Exercises\n- One."), "has 0 key points"),
    (source(1, "## Key points\n" + "- One.\n" * 5 + "## Exercises"), "has 5 key points"),
    (source(2, "1 + 1"), "has no graded exercise"),
    (source(3, "[01](01_next.ipynb)"), "does not end with a link"),
    (source(3, "**Next**: notebook 01"), "does not end with a link"),
]


def test_a_good_lesson_lacks_nothing():
    assert problems_of_lesson(lesson()) == []
    other = lesson()
    source(3, "## Next\n\n[README](README.md)")(other)
    assert problems_of_lesson(other) == []


@pytest.mark.parametrize(("change", "sentence"), LACKING, ids=[f"{i} {sentence}" for i, (_, sentence) in enumerate(LACKING)])
def test_what_a_lesson_lacks_is_found(change, sentence):
    notebook = lesson()
    change(notebook)
    assert any(sentence in problem for problem in problems_of_lesson(notebook)), problems_of_lesson(notebook)


def test_dead_links_are_found(tmp_path):
    page = tmp_path / "README.md"
    page.write_text("[here](README.md), [gone](gone.ipynb), [elsewhere](https://example.org/a)")
    assert dead_links(page) == ["gone.ipynb"]
