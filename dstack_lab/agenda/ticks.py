"""Which items are recorded: what lies in the data folder, beside what ``data/README.md`` says."""

from __future__ import annotations

import json
import re
from pathlib import Path

LINE = re.compile(
    r"^- \[(?P<tick>[ x])\] \d+\. \*\*(?P<item>\w+)\*\*(?: \((?P<date>\d{4}-\d\d-\d\d), (?P<device>[^)]+)\))?:", re.MULTILINE
)


def recorded(folder: Path, item: str) -> dict[str, tuple[str, bool, list[str]]]:
    """Device -> date of the last call, whether nothing is left, and what failed; GPUs only."""
    found = {}
    for path in sorted((Path(folder) / item).glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if path.stem != "cpu":
            found[path.stem] = record["calls"][-1]["date"], bool(record["complete"]), list(record["failed"])
    return found


def said(readme: Path) -> dict[str, tuple[bool, str, str]]:
    """Item -> whether it is ticked, with date and device, in the list of ``data/README.md``."""
    text = Path(readme).read_text(encoding="utf-8")
    return {m["item"]: (m["tick"] == "x", m["date"] or "", m["device"] or "") for m in LINE.finditer(text)}


def contradictions(readme: Path, folder: Path) -> list[str]:
    """Sentences about ticks that are not as the recorded files say."""
    wrong = []
    for item, (ticked, date, device) in said(readme).items():
        whole = {name: when for name, (when, complete, _) in recorded(folder, item).items() if complete}
        if ticked and whole.get(device) != date:
            wrong.append(
                f"{item} is ticked for {device or 'no device'} on {date or 'no date'}, but recorded is {whole or 'nothing'}"
            )
        if whole and not ticked:
            wrong.append(f"{item} is recorded for {', '.join(whole)}, but not ticked: write [x] and (DATE, DEVICE)")
    return wrong


def status(folder: Path, items: tuple[str, ...]) -> str:
    """Table for the terminal: what is recorded under `folder`, item by item."""
    lines = []
    for item in items:
        for device, (date, complete, failed) in recorded(folder, item).items() or [("-", ("", False, []))]:
            state = "nothing recorded" if device == "-" else "complete" if complete else "not complete: call again"
            state += f"; failed: {', '.join(failed)}" if failed else ""
            lines.append(f"{item:10} {device:12} {date:10} {state}")
    return "\n".join(lines)
