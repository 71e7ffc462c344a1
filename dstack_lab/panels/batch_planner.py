"""Which batch, on which share? What an SLO and a rate allow, and what keeps the best point from being better."""

from __future__ import annotations

import os
from collections.abc import Iterable

from dstack_lab import figures
from dstack_lab.arrivals import Poisson
from dstack_lab.constraints import OBJECTIVES
from dstack_lab.panels.base import Look, Panel, as_profile
from dstack_lab.profiles import DEFAULT_PROFILE, Profile
from dstack_lab.services import Service

#: What keeps the best point from being better, by its name in `constraints.BINDINGS`; one service alone has the whole GPU.
LIMITS = {
    "SLO: wait": "A better point would answer too late behind the batch before (“SLO: wait”)",
    "SLO: fill": "A better point would answer too late while its batch fills (“SLO: fill”)",
    "rate": "A better point could not keep up with the requests (“rate”)",
    "largest batch": "A better point would need a larger batch than the profile holds (“largest batch”)",
    "smallest share": "A better point would need a smaller share than can be granted (“smallest share”)",
    "largest share": "A better point would need a larger share than there is (“largest share”)",
    "none": "No constraint binds: no other point is better",
}


class BatchPlanner(Panel):
    """Batch and share of one service, by the optimizer.

    Parameters
    ----------
    profile : Profile, str or path
        Or its name, as for `lab.load_profile`.
    models : str or iterable of str, optional
        Networks to offer; all of the profile by default.

    Attributes
    ----------
    model, slo_ms, rate_rps, objective, gpu_pct
        Controls. `gpu_pct` is the share to look at in detail; the best share does not depend on it.
    """

    def __init__(
        self, profile: Profile | str | os.PathLike[str] = DEFAULT_PROFILE, models: Iterable[str] | str | None = None
    ) -> None:
        super().__init__()
        self.profile = as_profile(profile)
        self._networks(models, self.profile.models, "Which network answers the requests")
        self.slo_ms = self._slider("slo_ms", "SLO [ms]", 1.0, 500.0, 50.0, "Longest time from arrival to answer", step=1.0)
        self.rate_rps = self._slider(
            "rate_rps", "Rate [requests/s]", 1.0, 10_000.0, 400.0, "Requests that arrive each second", step=0.02, log=True
        )
        self.objective = self._choice("objective", "Objective", OBJECTIVES, "What the best point is best in")
        self.gpu_pct = self._slider("gpu_pct", "Look at share [GPU%]", 1, 100, 50, "The share drawn on the right")
        self._begin()

    def _look(self) -> Look:
        model, slo, rate = self.model.value, self.slo_ms.value, self.rate_rps.value
        objective, share = self.objective.value, self.gpu_pct.value
        service = Service(model, slo, Poisson(rate))
        found = figures.choose(self.profile, service, objective, share)
        best, here = found.best, found.best_here
        facts = {
            "model": model,
            "slo_ms": round(slo, 3),
            "rate_rps": round(rate, 3),
            "objective": objective,
            "feasible": best is not None,
            "best_batch": best and best.batch,
            "best_gpu_pct": best and best.gpu_pct,
            "service_ms": best and round(best.service_ms, 3),
            "capacity_rps": best and round(1000 * best.batch / best.service_ms, 1),
            "demand_pct": best and round(best.rate_rps * best.area_pct_ms / 1000, 1),
            "binds": best and best.binding,
            "gpu_pct": share,
            "batch_here": here and here.batch,
        }
        at = "no batch is allowed" if here is None else f"the best batch is {here.batch}"
        if best is None:
            words = f"No point is allowed: {found.words}. At {share} %, {at}."
        else:
            words = (
                f"For {rate:,.4g} requests/s of {model} within {slo:g} ms, the best is batch {best.batch} at {best.gpu_pct:g} %: "
                f"{best.service_ms:.3g} ms a batch, up to {1000 * best.batch / best.service_ms:,.0f} requests/s. "
                f"{LIMITS[best.binding]}. At {share} %, {at}."
            )
        return Look(facts, words, figures.choices(self.profile, found), found.words)
