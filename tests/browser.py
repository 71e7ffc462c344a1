"""JupyterLab in a browser without a screen, for tests: one server, one page, many notebooks."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

#: Names of the browser; none is ever downloaded.
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
SETTINGS = {
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True}
}
LOCAL = ("127.0.0.1", "localhost")

OPEN = """async path => { const app = window.jupyterapp; await app.restored;
  const panel = await app.commands.execute('docmanager:open', {path, factory: 'Notebook'});
  await panel.context.ready; await panel.sessionContext.ready; }"""
# Resolves when all cells are done; the menu's command may be lost before a kernel is connected.
RUN = "async () => { await window.jupyterapp.commands.execute('notebook:run-all-cells'); }"
RESTART = "async () => { await window.jupyterapp.shell.currentWidget.sessionContext.restartKernel(); }"
CLOSE = """async () => { const panel = window.jupyterapp.shell.currentWidget;
  await panel.context.save(); await panel.sessionContext.shutdown(); panel.dispose(); }"""
TROUBLE = """() => [...window.jupyterapp.shell.currentWidget.content.widgets].flatMap(cell => {
  const found = []; const outputs = cell.model.outputs; if (!outputs) return found;
  for (let i = 0; i < outputs.length; i++) { const o = outputs.get(i).toJSON();
    if (o.output_type === 'error' || o.name === 'stderr') found.push(JSON.stringify(o)); }
  return found; })"""


def browser() -> str | None:
    """Path of a browser on this machine."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


@contextmanager
def lab_server(folder: Path) -> Iterator[str]:
    """Start JupyterLab on the notebooks of `folder`, with settings of its own; yield its address."""
    home = folder / ".jupyter"
    (home / "config" / "labconfig").mkdir(parents=True)
    (home / "config" / "labconfig" / "default_setting_overrides.json").write_text(json.dumps(SETTINGS))
    environment = {**os.environ, **{f"JUPYTER_{k.upper()}_DIR": str(home / k) for k in ("config", "data", "runtime")}}
    token = secrets.token_hex(16)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--allow-root"]
    command += ["--ServerApp.port_retries=0", f"--IdentityProvider.token={token}", f"--notebook-dir={folder}"]
    command += ["--expose-app-in-browser", "--LabApp.extension_manager=readonly"]
    command += ["--LabApp.check_for_updates_class=jupyterlab.handlers.announcements.NeverCheckForUpdate"]
    log = folder / "lab.log"
    with log.open("w") as out, subprocess.Popen(command, env=environment, stdout=out, stderr=out) as server:
        try:
            _wait_for(f"http://127.0.0.1:{port}/api/status?token={token}", server, log)
            yield f"http://127.0.0.1:{port}/lab?token={token}&reset"
        finally:
            server.terminate()
            server.wait(20)


def _wait_for(address: str, server: subprocess.Popen[bytes], log: Path, seconds: float = 90) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and server.poll() is None:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.2)
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text()[-3000:]}")


class Lab:
    """A page of JupyterLab and what went wrong in it."""

    def __init__(self, page: Any, address: str) -> None:
        self.page = page
        self.problems: list[str] = []
        self.present = "Light"
        page.on("pageerror", lambda error: self.problems.append(f"page error: {error}"))
        page.on("request", lambda request: self._asked(request.url))
        page.on("websocket", lambda socket: self._asked(socket.url))
        page.goto(address)
        page.wait_for_function("window.jupyterapp?.shell != null", timeout=90_000)

    def _asked(self, url: str) -> None:
        parts = urlparse(url)
        if parts.scheme not in ("data", "blob", "about") and parts.hostname not in LOCAL:
            self.problems.append(f"request that leaves this machine: {url}")

    @contextmanager
    def notebook(self, path: str, run: bool = True) -> Iterator[Any]:
        """Open a notebook and run all cells; yield its part of the page; nothing may have gone wrong at the end."""
        self.problems.clear()
        self.page.evaluate(OPEN, path)
        try:
            if run:
                self.run()
            yield self.page.locator(".jp-NotebookPanel:not(.lm-mod-hidden)")
            assert self.page.evaluate(TROUBLE) == []
            assert self.problems == []
        finally:
            self.page.evaluate(CLOSE)

    def run(self) -> None:
        """Run all cells of the open notebook."""
        self.page.evaluate(RUN)

    def restart(self) -> None:
        """Restart the kernel of the open notebook."""
        self.page.evaluate(RESTART)

    def theme(self, name: str) -> None:
        """Change the colours of JupyterLab to ``Light`` or ``Dark``; it hides the page behind a splash for a second."""
        change = "name => window.jupyterapp.commands.execute('apputils:change-theme', {theme: `JupyterLab ${name}`})"
        self.page.evaluate(change, name)
        self.page.wait_for_function("light => document.body.dataset.jpThemeLight === light", arg=str(name == "Light").lower())
        self.page.locator("#jupyterlab-splash").wait_for(state="detached")
        self.present = name

    def themes(self) -> tuple[str, str]:
        """Both themes, the present one first."""
        return ("Light", "Dark") if self.present == "Light" else ("Dark", "Light")
