"""What each ingredient of D-STACK is worth: the same requests with one of them left out, or one added."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pandas as pd

from dstack_lab.experiments import compare
from dstack_lab.policies import AdaptiveDStack, DStack, Policy
from dstack_lab.profiles import Profile
from dstack_lab.services import Service

WHOLE = "D-STACK"


def variants() -> dict[str, Policy]:
    """D-STACK and its variants, by what is different; all drop requests that they cannot serve in time."""
    return {
        WHOLE: DStack(reject=True),
        "no fairness": DStack(fair=False, reject=True),
        "lanes of their own": DStack(pool=False, reject=True),
        "windows take turns": DStack(beside=False, reject=True),
        "no planned windows": DStack(planned=False, reject=True),
        "no opportunistic launches": DStack(opportunistic=False, reject=True),
        "turns, no fairness": DStack(beside=False, fair=False, reject=True),
        "turns, no patience": DStack(beside=False, patience=0.0, reject=True),
        "follows arrivals": AdaptiveDStack(),
    }


def ablate(services: Iterable[Service], profile: Profile, **options: Any) -> pd.DataFrame:
    """Compare D-STACK with itself less, or plus, one ingredient.

    Parameters
    ----------
    services : iterable of Service
    profile : Profile
    **options
        Of `compare`: ``loads``, ``seeds``, ``duration_ms``, ``shares``, ``objective``, ``folder``, ``jobs``, ...

    Returns
    -------
    pandas.DataFrame
        As `compare` returns, against D-STACK as the baseline: ``slo_attainment_gain`` says what a change costs
        (below 0) or brings, with the ends of its interval over the seeds.
    """
    return compare(services, profile, variants(), baseline=WHOLE, **options)
