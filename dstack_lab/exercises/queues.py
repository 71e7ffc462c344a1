"""Exercises on queues: utilization, and how long requests wait, by closed forms."""

from __future__ import annotations

import math

from dstack_lab.checks import count, non_negative, positive, require
from dstack_lab.exercises.base import Mistake, Verdict, graded


def mg1_wait_ms(rate_rps: float, service_ms: float, cv: float = 0.0) -> float:
    """Mean wait [ms] before service in M/G/1, by Pollaczek and Khinchine; `cv` of service times 0 is M/D/1, 1 is M/M/1.

    Poisson arrivals, one server, first come first served, one request at a time:
    rho S (1 + cv²) / (2 (1 - rho)), with rho = rate x S; infinite from rho = 1 on.
    """
    load = positive("rate_rps", rate_rps) * positive("service_ms", service_ms) / 1000
    return load * service_ms * (1 + non_negative("cv", cv) ** 2) / (2 * (1 - load)) if load < 1 else math.inf


def check_load(answer: object, rate_rps: float, service_ms: float, batch: int = 1) -> Verdict:
    """Judge the part of the time [fraction] that a server of one launch after another is busy.

    Parameters
    ----------
    answer : number
        Fraction; above 1 if requests come faster than they can be served.
    rate_rps : float
        Arrivals [requests/s].
    service_ms : float
        Service time of a batch [ms].
    batch : int
        Requests of each batch, all full.
    """
    truth = rate_rps * service_ms / 1000 / count("batch", batch)
    mistakes = [
        Mistake(
            rate_rps * service_ms / 1000, f"A launch serves {batch} requests at once: how many launches are that per second?"
        ),
        Mistake(1 / truth, "Upside down: busy time over all time."),
        Mistake(rate_rps * service_ms / batch, "Mind the units: the rate is per second, the service time in ms."),
        Mistake(1 - truth, "That is the part of the time in which nothing runs."),
        Mistake(rate_rps / batch, "That is launches per second. How much of a second does each of them take?"),
        Mistake(rate_rps * service_ms * batch / 1000, "A batch is one launch: the requests of a batch share its service time."),
    ]
    why = f"{rate_rps / batch:g} launches/s x {service_ms:g} ms keep it busy for that part of every second."
    return graded(answer, truth, "fraction", why, mistakes, "Utilization is launches per second x seconds per launch.")


def check_wait(answer: object, rate_rps: float, service_ms: float, cv: float = 0.0) -> Verdict:
    """Judge the mean wait before service [ms] in M/D/1 (`cv` 0) or M/G/1, one request at a time.

    Parameters
    ----------
    answer : number
        Wait [ms], without the service itself.
    rate_rps, service_ms : float
        Arrivals [requests/s] and mean service time [ms]; the load must be below 1.
    cv : float
        Coefficient of variation of the service times.
    """
    truth = mg1_wait_ms(rate_rps, service_ms, cv)
    require(math.isfinite(truth), "rate_rps", rate_rps, f"below {1000 / service_ms:g}, so that the queue is stable")
    load = rate_rps * service_ms / 1000
    even, memoryless = mg1_wait_ms(rate_rps, service_ms), mg1_wait_ms(rate_rps, service_ms, 1.0)
    law = "every service takes equally long" if cv == 0 else f"service times scatter with cv = {cv:g}"
    mistakes = [
        Mistake(truth + service_ms, "That is the whole latency. Leave out the request's own service."),
        Mistake(memoryless, f"That is M/M/1, with exponential service times. Here {law}."),
        Mistake(even, f"That is M/D/1, with equal service times. Here {law}: which factor is missing?"),
        Mistake(truth * (1 - load), "Near: one factor of 1 / (1 - utilization) is missing."),
        Mistake(even * (1 + cv), "Near: the coefficient of variation enters squared."),
        Mistake(
            load * service_ms,
            "That is utilization x service time. It grows without limit as utilization nears 1: which factor does that?",
        ),
        Mistake(memoryless + service_ms, f"That is the whole latency in M/M/1. Leave out the service itself; and here {law}."),
        Mistake(2 * truth, "Twice too long: of a service in progress, only half is left on average."),
        Mistake(load, "That is the utilization. How does the mean wait grow with it?"),
        Mistake(service_ms / 2, "That is what is left of a service in progress. How many requests are ahead, on average?"),
    ]
    why = "The mean wait grows with utilization / (1 - utilization), times half a service time, times (1 + cv²)."
    return graded(
        answer, truth, "ms", why, mistakes, "Compute the utilization first, then the formula of Pollaczek and Khinchine."
    )


def check_rate_for_wait(answer: object, service_ms: float, wait_ms: float, cv: float = 0.0) -> Verdict:
    """Judge the highest Poisson rate [requests/s] whose mean wait is at most `wait_ms`.

    Parameters
    ----------
    answer : number
        Rate [requests/s].
    service_ms, wait_ms : float
        Mean service time and allowed mean wait [ms].
    cv : float
        Coefficient of variation of the service times.
    """
    factor = positive("service_ms", service_ms) * (1 + non_negative("cv", cv) ** 2) / 2
    load = positive("wait_ms", wait_ms) / (wait_ms + factor)
    truth = 1000 * load / service_ms
    memoryless = 1000 * wait_ms / (wait_ms + service_ms) / service_ms
    mistakes = [
        Mistake(1000 / service_ms, "At that rate the server is always busy and the wait has no limit."),
        Mistake(
            1000 / (service_ms + wait_ms),
            "That spaces requests evenly. Poisson arrivals come in clumps: solve the formula of the wait for the rate.",
        ),
        Mistake(load, "That is the utilization. Turn it into a rate."),
        Mistake(100 * load, "That is the utilization in percent. Turn it into a rate."),
        Mistake(
            memoryless,
            "That is right for exponential service times; here they scatter less." if cv < 1 else "That is for cv = 1.",
        ),
    ]
    if wait_ms > service_ms:
        inside = (wait_ms - service_ms) / (wait_ms - service_ms + factor)
        mistakes.append(
            Mistake(1000 * inside / service_ms, "That keeps the whole latency within the limit. The limit is on the wait alone.")
        )
    why = "Solved for the rate; note how far below the server's full rate it lies: that distance buys the short wait."
    return graded(
        answer,
        truth,
        "requests/s",
        why,
        mistakes,
        "Set the formula of the mean wait equal to the limit and solve for the utilization.",
    )
