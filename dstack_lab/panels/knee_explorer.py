"""How much of a GPU does a network use? Service time against GPU%, the knee, and where you are."""

from __future__ import annotations

import os
from collections.abc import Iterable

from dstack_lab import figures
from dstack_lab.figures.curves import curve_of
from dstack_lab.knees import RULES
from dstack_lab.panels.base import Look, Panel, as_profile
from dstack_lab.profiles import DEFAULT_PROFILE, Profile


class KneeExplorer(Panel):
    """Service time of a network against its share of the GPU.

    Parameters
    ----------
    profile : Profile, str or path
        Or its name, as for `lab.load_profile`.
    models : str or iterable of str, optional
        Networks to offer; all of the profile by default.

    Attributes
    ----------
    model, batch, rule, gpu_pct, slo_ms
        Controls. `slo_ms` is for the rule ``capacity`` alone.
    """

    def __init__(
        self, profile: Profile | str | os.PathLike[str] = DEFAULT_PROFILE, models: Iterable[str] | str | None = None
    ) -> None:
        super().__init__()
        self.profile = as_profile(profile)
        names = self._networks(models, self.profile.models, "Whose service time is drawn")
        rows = self.profile.table
        most = int(rows.loc[rows["model"].isin(names), "batch"].max())
        self.batch = self._slider("batch", "Batch [requests]", 1, most, min(8, most), "Requests answered by one launch")
        self.gpu_pct = self._slider("gpu_pct", "Share [GPU%]", 1, 100, 50, "Part of the GPU's multiprocessors a launch may use")
        self.rule = self._choice("rule", "Rule of the knee", RULES, "What counts as hardly any faster")
        self.slo_ms = self._slider("slo_ms", "SLO for capacity [ms]", 1.0, 500.0, 50.0, "For the rule capacity alone", step=1.0)
        self._begin()

    def _look(self) -> Look:
        model, batch, rule, share = self.model.value, self.batch.value, self.rule.value, self.gpu_pct.value
        slo = self.slo_ms.value if rule == "capacity" else None
        curve = curve_of(self.profile, model, batch, rule, slo)
        knee, ms, whole = curve.knee, curve.at(share), curve.at(100)
        known = None if knee.pct != knee.pct else round(knee.pct, 1)
        facts = {
            "model": model,
            "batch": batch,
            "gpu_pct": share,
            "service_ms": round(ms, 3),
            "slowdown": round(ms / whole, 3),
            "knee_pct": known,
            "rule": rule,
        }
        words = (
            f"{model} takes {ms:.3g} ms for a batch of {batch} on {share} % of the GPU, {ms / whole:.2f} times as long as on all "
            f"of it. By the rule {rule}: {knee}."
        )
        return Look(facts, words, figures.knee(self.profile, model, batch, rule, slo, at_pct=share))
