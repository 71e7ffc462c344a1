"""Import plotly without what it brings along and nobody here uses.

plotly imports nbformat if that is there, nbformat imports jsonschema, and jsonschema builds a parser of
internationalised resource identifiers, for a check that no notebook needs: more than a second of processor
time, in every kernel, before the first figure.
"""

from __future__ import annotations

import sys

PARSER = "rfc3987_syntax"


def import_plotly() -> None:
    """Import plotly as if the parser were not installed; jsonschema then does without it. Later imports find it again."""
    import plotly.io

    if PARSER in sys.modules or "jsonschema" in sys.modules:  # it is paid for already
        return
    sys.modules[PARSER] = None  # type: ignore[assignment]  # what Python takes for "not installed"
    try:
        _ = plotly.io.renderers  # loaded at this first use, and nbformat with it
    finally:
        del sys.modules[PARSER]


import_plotly()
