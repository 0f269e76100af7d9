"""Plans and searches with settings given as keywords, as most tests want them."""

from __future__ import annotations

import itertools
import math
from typing import Any

from spu.plan import Plan, make_plan
from spu.plan.machine import Machine, Speed
from spu.plan.search import search_plan
from spu.settings import Settings


def plan(costs: Any, devices: Any, speeds: Any = None, link: float = math.inf, **options: Any) -> Plan:
    """`make_plan` with the fields of `Settings` among its keywords, on devices of these FLOP/s; all links are alike."""
    count = len(devices)
    links = dict.fromkeys(itertools.permutations(range(count), 2), link)
    made_up = {} if speeds else {device.name: "a test" for device in devices}
    rates = tuple(Speed(flops, math.inf) for flops in speeds or [5e10] * count)
    machine = Machine(tuple(devices), rates, links, made_up)
    return make_plan(costs, machine, *_split(options), **options)


def search(costs_of: Any, machine: Any, **options: Any) -> Plan:
    """`search_plan` likewise, of any schedule and number of microbatches, packing nothing, unless said otherwise."""
    options = {"schedule": "auto", "microbatches": "auto", "transfer": "none", **options}
    return search_plan(costs_of, machine, *_split(options), **options)


def _split(options: dict[str, Any]) -> tuple[Settings]:
    return (Settings(**{name: options.pop(name) for name in Settings.names() if name in options}),)
