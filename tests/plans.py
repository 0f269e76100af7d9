"""Plans and searches with settings given as keywords, as most tests want them."""

from __future__ import annotations

from typing import Any

from spu.plan import Plan, make_plan
from spu.plan.search import search_plan
from spu.settings import Settings


def plan(costs: Any, devices: Any, **options: Any) -> Plan:
    """`make_plan` with the fields of `Settings` among its keywords."""
    return make_plan(costs, devices, *_split(options), **options)


def search(costs_of: Any, machine: Any, **options: Any) -> Plan:
    """`search_plan` likewise, of any schedule and number of microbatches, packing nothing, unless said otherwise."""
    options = {"schedule": "auto", "microbatches": "auto", "transfer": "none", **options}
    return search_plan(costs_of, machine, *_split(options), **options)


def _split(options: dict[str, Any]) -> tuple[Settings]:
    return (Settings(**{name: options.pop(name) for name in Settings.names() if name in options}),)
