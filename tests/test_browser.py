"""The panels as a reader meets them: in JupyterLab in a browser, by keyboard, in light and dark.

Pictures of all of them are left in build/browser.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from browser import FLAGS, Lab, browser, lab_server

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[test]'")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(browser() is None, reason="no Chromium on this machine: apt-get install chromium"),
]
ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "build" / "browser"
PANELS = ("KneeExplorer", "BatchPlanner", "ModelAnatomy", "ScheduleExplorer", "PolicyRace")
#: Notebooks whose panels answer a slider at once; a live run starts by its button, and has a test of its own below.
COURSE = sorted(
    path.name
    for path in (ROOT / "notebooks").glob("*.ipynb")
    if "lab.panels." in path.read_text().replace("lab.panels.LiveRun", "")
)
WAIT_MS = 60_000  #: a busy machine is slow without being wrong

#: What the marks of a panel's figure look like: lines, bars and pictures, without the frame.
DRAWN = "plot => [...plot.querySelectorAll('.cartesianlayer, .gtitle')].map(part => part.innerHTML).join()"
#: A notebook that cannot show widgets, as where JupyterLab lacks the extension for them.
FORGET = """() => window.jupyterapp.shell.currentWidget.content.rendermime.removeMimeType(
  'application/vnd.jupyter.widget-view+json')"""
CONTROLS = "input, select, .noUi-handle, .jupyter-button"


def written(folder: Path, name: str, *cells: str) -> str:
    """Write a notebook of `cells`; return its name."""
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(book, folder / name)
    return name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the notebooks lie that JupyterLab opens."""
    return tmp_path_factory.mktemp("notebooks")


@pytest.fixture(scope="module")
def lab(folder: Path) -> Iterator[Lab]:
    """JupyterLab, one server and one page for all tests."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    with lab_server(folder) as address, playwright.sync_playwright() as play:
        with play.chromium.launch(executable_path=browser(), args=FLAGS.split()) as chromium:
            page = chromium.new_page(viewport={"width": 1250, "height": 1100})
            page.set_default_timeout(WAIT_MS)
            playwright.expect.set_options(timeout=WAIT_MS)
            yield Lab(page, address)


def cut(source: Path, target: Path) -> None:
    """Copy of a notebook what its first panel needs; the rest is checked elsewhere, and takes its time."""
    book = nbformat.read(source, as_version=4)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    last = next(i for i, cell in enumerate(code) if "lab.panels." in cell.source)
    kept, needed = [], set()
    for cell in reversed(code[: last + 1]):
        nodes = list(ast.walk(ast.parse(cell.source)))
        names = {True: set(), False: set()}
        for node in nodes:
            if isinstance(node, ast.Name):
                names[isinstance(node.ctx, ast.Load)].add(node.id)
            elif isinstance(node, ast.ClassDef | ast.FunctionDef):
                names[False].add(node.name)
        imports = any(isinstance(node, ast.Import | ast.ImportFrom) for node in nodes)
        if cell is code[last] or imports or names[False] & needed:
            kept.insert(0, cell)
            needed |= names[True]
    book.cells = kept
    nbformat.write(book, target)


def panel_in(book: Any, which: int = 0) -> Any:
    """Return the panel of a notebook whose figure is drawn."""
    panel = book.locator(".jp-OutputArea .widget-vbox").filter(has=book.page.locator(".js-plotly-plot")).nth(which)
    panel.locator(".js-plotly-plot .main-svg").first.wait_for()
    return panel


def changed(panel: Any, before: str) -> bool:
    """Whether the figure of a panel comes to differ from `before`."""
    plot = panel.locator(".js-plotly-plot")
    for _ in range(WAIT_MS // 100):
        if plot.evaluate(DRAWN) != before:
            return True
        panel.page.wait_for_timeout(100)
    return False


def moved(panel: Any, key: str = "PageUp") -> None:
    """Move the first slider of a panel by keyboard: the figure and the words must follow."""
    plot, words = panel.locator(".js-plotly-plot"), panel.locator("p").last
    before, said = plot.evaluate(DRAWN), words.inner_text()
    panel.locator(".noUi-handle").first.focus()
    panel.page.keyboard.press(key)
    assert changed(panel, before), "the figure did not follow the slider"
    playwright.expect(words).not_to_have_text(said)


def pictured(lab: Lab, panel: Any, name: str) -> None:
    """Leave a picture of a panel in each theme."""
    for theme in lab.themes():
        lab.theme(theme)
        panel.screenshot(path=PICTURES / f"{name}-{theme.lower()}.png")


def reached(panel: Any) -> tuple[int, int]:
    """Walk through a panel with the tab key: controls that were met, controls that there are."""
    controls = panel.locator(CONTROLS)
    controls.first.focus()
    mark = f"[...document.activeElement.closest('.widget-vbox').querySelectorAll('{CONTROLS}')].indexOf(document.activeElement)"
    count = panel.locator(f":is({CONTROLS}):enabled").count()
    met = set()
    for _ in range(count):
        met.add(panel.page.evaluate(mark))
        panel.page.keyboard.press("Tab")
    return len(met - {-1}), count


@pytest.mark.parametrize("name", PANELS)
def test_panel(lab, folder, name):
    file = written(folder, f"{name}.ipynb", "import dstack_lab as lab", f"panel = lab.panels.{name}()\npanel")
    with lab.notebook(file) as book:
        panel = panel_in(book)
        moved(panel)
        met, count = reached(panel)
        assert met == count
        pictured(lab, panel, name)
        assert panel.get_by_label("Share chart").count() == 0


def test_late_requests_are_red_and_hatched(lab, folder):
    panel = (
        "panel = lab.panels.ScheduleExplorer(policies=lab.Temporal())\npanel.load.value = 1.2\npanel.start_ms.value = 800\npanel"
    )
    with lab.notebook(written(folder, "late.ipynb", "import dstack_lab as lab", panel)) as book:
        panel = panel_in(book)
        title = panel.locator(".gtitle").bounding_box()
        assert title["height"] > 30, "title and subtitle lie on each other before the first change"
        assert panel.locator(".gsubtitle, .gtitle-subtitle").count() == 0
        assert panel.locator(".barlayer path[style*='pattern'], .barlayer path[style*='url']").count() > 0
        pictured(lab, panel, "ScheduleExplorer-late")


def test_live_run_starts_and_stops(lab, folder):
    file = written(folder, "LiveRun.ipynb", "import dstack_lab as lab", "panel = lab.panels.LiveRun()\npanel")
    with lab.notebook(file) as book:
        panel = panel_in(book)
        met, count = reached(panel)
        assert met == count
        panel.get_by_role("button", name="Start").press("Enter")
        playwright.expect(panel.locator(".gtitle")).to_contain_text("measuring")
        pictured(lab, panel, "LiveRun")
        panel.get_by_role("button", name="Stop").press("Enter")
        playwright.expect(panel.locator(".gtitle")).to_contain_text("stopped before it began")


def test_a_browser_without_the_widget_shows_picture(lab, folder):
    cells = ["import dstack_lab as lab", "panel = lab.panels.KneeExplorer()\npanel"]
    with lab.notebook(written(folder, "plain.ipynb", *cells), run=False) as book:
        lab.page.evaluate(FORGET)
        lab.run()
        picture = book.locator(".jp-OutputArea img")
        picture.wait_for()
        assert picture.evaluate("image => image.complete && image.naturalWidth") >= 600
        assert book.locator(".js-plotly-plot, .widget-vbox").count() == 0
        assert book.get_by_text("rror displaying widget").count() == 0


def test_two_panels_and_a_new_kernel(lab, folder):
    cells = ["import dstack_lab as lab", "lab.panels.KneeExplorer()", "lab.panels.BatchPlanner()"]
    with lab.notebook(written(folder, "two.ipynb", *cells)) as book:
        for turn in range(2):
            if turn:
                lab.restart()
                lab.run()
            first, second = panel_in(book), panel_in(book, 1)
            untouched = second.locator(".js-plotly-plot").evaluate(DRAWN)
            moved(first)
            assert second.locator(".js-plotly-plot").evaluate(DRAWN) == untouched
            moved(second)


@pytest.mark.parametrize("name", COURSE)
def test_notebook_of_the_course(lab, folder, name):
    cut(ROOT / "notebooks" / name, folder / name)
    with lab.notebook(name) as book:
        panel = panel_in(book)
        moved(panel)
        pictured(lab, panel, Path(name).stem)
    assert json.loads((folder / name).read_text())["metadata"].get("widgets") is None
