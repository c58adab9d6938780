"""Removes the synchronizations of a kernel one at a time; every one must be missed by some test."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

from emulator.harness import Site, emulated, sites

__all__ = ["SCHEDULES", "assert_every_site_matters", "surviving_sites"]

Environment = Callable[..., AbstractContextManager[Any]]

SCHEDULES: tuple[dict[str, Any], ...] = (
    {"order": "reverse"},
    *({"order": "random", "seed": seed} for seed in range(3)),
    {"variant": "race", "order": "in order"},
)
"""Cheap ones first: most mistakes show in the first."""


def assert_every_site_matters(
    *runs: Callable[[], None],
    ignored: Callable[[Site], bool] = lambda site: False,
    environment: Environment = emulated,
) -> None:
    """Asserts that every synchronization in the kernels is needed, and that its absence does not go unseen.

    Each ``run`` calls the op and raises AssertionError if the result is wrong. All must pass in all of
    :data:`SCHEDULES`. Then each site that they reached is skipped (a ``copy wait`` waits for one group less):
    some run must fail in some schedule, by its result or by what the emulator finds. A site may be redundant
    for one shape and not for another: give a run for each. ``ignored`` excuses sites that other tests answer
    for.
    """
    survivors = surviving_sites(*runs, ignored=ignored, environment=environment)
    if survivors:
        lines = "\n".join(f"  {site}" for site in survivors)
        raise AssertionError(f"nothing fails without these synchronizations:\n{lines}")


def surviving_sites(
    *runs: Callable[[], None],
    ignored: Callable[[Site], bool] = lambda site: False,
    environment: Environment = emulated,
) -> list[Site]:
    """The sites without which every run passes in every schedule."""
    used = list(_used_sites(runs, environment))
    return [site for site in used if not ignored(site) and not _is_missed(site, runs, environment)]


def _used_sites(runs: Sequence[Callable[[], None]], environment: Environment) -> Iterator[Site]:
    seen = set()
    for schedule in SCHEDULES:
        for run in runs:
            with environment(**schedule):
                run()
                found = sites()
            for site in found:
                if (site.kind, site.file, site.line) not in seen:
                    seen.add((site.kind, site.file, site.line))
                    yield site


def _is_missed(site: Site, runs: Sequence[Callable[[], None]], environment: Environment) -> bool:
    return any(_fails(run, site, schedule, environment) for schedule in SCHEDULES for run in runs)


def _fails(run: Callable[[], None], site: Site, schedule: dict[str, Any], environment: Environment) -> bool:
    try:
        with environment(**schedule, dropped=[site]):
            run()
    except (AssertionError, RuntimeError):
        return True
    return False
