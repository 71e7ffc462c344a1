"""What the public names say of themselves: every parameter is documented, none that is gone."""

from __future__ import annotations

import inspect
import re

import pytest

import dstack_lab as lab

ROOMS = {"lab": lab, **{name: getattr(lab, name) for name in ("devices", "exercises", "figures", "panels", "policies", "zoo")}}


def public(room):
    """Names of a room that are its own, or re-exported by it."""
    names = getattr(room, "__all__", None) or [name for name in dir(room) if not name.startswith("_")]
    return [name for name in names if callable(getattr(room, name)) and getattr(room, name).__module__.startswith(room.__name__)]


NAMES = [(room, name) for room, module in ROOMS.items() for name in public(module)]


def documented(text: str) -> set[str]:
    """Names in the sections Parameters and Attributes of a docstring; ``*`` and ``**`` do not count."""
    found: set[str] = set()
    for section in re.findall(r"^(?:Parameters|Attributes)\n-+\n(.*?)(?=^\w[^\n]*\n-+\n|\Z)", text, re.MULTILINE | re.DOTALL):
        for line in re.findall(r"^(\S.*)$", section, re.MULTILINE):
            found |= {name.strip("* ") for name in line.split(" : ")[0].split(",")}
    return found


@pytest.mark.parametrize(("room", "name"), NAMES, ids=[f"{room}.{name}" for room, name in NAMES])
def test_every_parameter_is_documented(room, name):
    thing = getattr(ROOMS[room], name)
    text = inspect.getdoc(thing) or ""
    assert text.strip(), "has no docstring"
    try:
        asked = {p.strip("*") for p in inspect.signature(thing).parameters} - {"args", "kwargs"}
    except ValueError:  # a built-in's, such as that of an exception
        return
    said = documented(text)
    assert asked <= said, f"not documented: {sorted(asked - said)}"
    attributes = {a for a in said if hasattr(thing, a)} if inspect.isclass(thing) else set()
    gone = said - asked - attributes if "Attributes\n---" not in text else set()
    assert not gone, f"documented, but not there: {sorted(gone)}"
