"""Recorded tables as they are put into a page."""

from __future__ import annotations

import pandas as pd


def markdown(table: pd.DataFrame) -> str:
    """What was recorded and what the simulator says, all services together, as a table of Markdown."""
    head: tuple[str, ...] = (
        "workload",
        "load",
        "policy",
        "in time [requests/s]",
        "simulated",
        "error",
        "SLO attainment",
        "simulated",
    )
    head = (*head, "p99 [ms]", "simulated", "error")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in table[table["service"] == "all"].to_dict("records"):
        cells = [f"{row['workload']} on {row['mechanism']}", f"{row['load']:g}", row["policy"]]
        for metric, form, error in (("goodput_rps", ".1f", True), ("slo_attainment", ".3f", False), ("p99_ms", ".0f", True)):
            cells += [format(row[metric], form), format(row[f"{metric}_simulated"], form)]
            cells += [f"{100 * row[f'{metric}_error']:+.1f} %"] if error else []
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
