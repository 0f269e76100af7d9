"""`spu plan`: from a config and a description of devices to a plan, its picture and its words, or a refusal."""

from __future__ import annotations

import dataclasses
import itertools
import time
from pathlib import Path

import torch

from spu.devices.manager import Device, DeviceManager, parse_bytes, split_pair
from spu.devices.speed import measure_device, measure_link
from spu.plan import Plan
from spu.plan.machine import Machine, make_machine, read_speeds
from spu.plan.search import search_plan
from spu.settings import Settings
from spu.train.config import PlanOptions
from spu.train.progress import terminal_width

__all__ = ["declared_devices", "describe_machine", "plan_command"]


def declared_devices(devices: str | None, budget: str | None) -> tuple[list[Device], set[str]]:
    """Return the devices to plan for, and the names of those that are not here.

    A GPU that this machine does not have needs a budget, which then is its memory. Default: the devices that the
    budget names; else what is here.

    Raises:
        ValueError: an absent GPU without a budget, or what `DeviceManager` refuses.
    """
    budgets = _split_budget(budget)
    names = [n.strip().lower() for n in devices.split(",") if n.strip()] if devices else list(budgets)
    manager = DeviceManager()
    if not names or names == ["auto"]:
        return DeviceManager(budget).get_devices("auto"), set()
    here = [f"cuda:{k}" for k in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)]
    twice = [n for k, n in enumerate(names) if n.startswith("cuda") and _full(n) in map(_full, names[:k])]
    if twice:
        raise ValueError(f"--devices {devices}: {_full(twice[0])} is named twice; GPUs are cuda:0, cuda:1, ...")
    absent = {_full(n) for n in names if n.startswith("cuda") and _full(n) not in here}
    known = [n for n in names if _full(n) not in absent]
    found: dict[str, Device] = {}
    if known:
        kept = {k: v for k, v in budgets.items() if _full(k) not in absent}
        total = manager.get_devices("cpu")[0].memory_bytes
        own = {k: v for k, v in kept.items() if not k.startswith("cpu") or v.endswith("%") or parse_bytes(v) <= total}
        made = DeviceManager(own or None).get_devices(known)
        for device in made:
            given = kept.get(device.name, kept.get("cpu") if device.name.startswith("cpu") else None)
            if given is not None and not given.endswith("%") and parse_bytes(given) > total:
                share = parse_bytes(given) // (1 if device.name in kept else len(made))
                device = dataclasses.replace(
                    device, budget_bytes=share, memory_bytes=share, description=f"declared; budget {given}"
                )
                absent.add(device.name)
            found[device.name] = device
    result, rest = [], iter(found.values())
    for name in names:
        result.append(
            _absent(_full(name), budgets) if _full(name) in absent and name.startswith("cuda") else next(rest)
        )
    return result, absent


def _full(name: str) -> str:
    return name if ":" in name or not name.startswith("cuda") else f"{name}:0"


def _split_budget(budget: str | None) -> dict[str, str]:
    result: dict[str, str] = {}
    for piece in (budget or "").split(","):
        if piece.strip():
            name, value = split_pair(piece, str(budget))
            full = _full(name.lower())
            if full in result:
                raise ValueError(f"budget {budget!r} names {full} twice, {result[full]} and {value}: give one")
            result[full] = value
    return result


def _absent(name: str, budgets: dict[str, str]) -> Device:
    given = budgets.get(name)
    if given is None:
        raise ValueError(f"{name} is not on this machine: say how much memory it has, --budget {name}=8GB")
    try:
        size = parse_bytes(given)
    except ValueError as error:
        raise ValueError(f"budget {name}={given}: {error}") from None
    return Device(name, torch.device(name), (), 1, size, size, f"declared; budget {given}")


def describe_machine(devices: list[Device], absent: set[str], speed: str | None, precision: str) -> Machine:
    """Return the speeds of the devices: measured where they are here and nothing else is said, nominal otherwise."""
    speeds = read_speeds(speed)
    strange = [n for n in speeds if not any(n in (d.name, d.name.split(":")[0]) for d in devices)]
    if strange:
        raise ValueError(f"--speed names {strange[0]}; the devices are {', '.join(d.name for d in devices)}")
    measured = {}
    for device in devices:
        if device.name not in absent and device.name not in speeds:
            figures = measure_device(device)
            measured[device.name] = (max(getattr(figures, precision), 1.0), figures.memory_bandwidth)
    known = [(index, device) for index, device in enumerate(devices) if device.name in measured]
    links = {(a, b): measure_link(x, y).bytes_per_s for (a, x), (b, y) in itertools.permutations(known, 2)}
    return make_machine(devices, measured, speeds, precision, links)


def plan_command(options: PlanOptions) -> Plan:
    """Plan, print, write.

    Raises:
        BudgetError: nothing fits; its text is for people.
        ValueError: bad options.
    """
    from spu.cost.blueprint import blueprint, costs_by_rows
    from spu.plan.show.explain import explain

    began = time.perf_counter()
    devices, absent = declared_devices(options.devices, options.budget)
    machine = describe_machine(devices, absent, options.speed, options.precision)
    layers = blueprint(options.model)
    parameters = sum({id(p): p.numel() for layer in layers for p in layer.module.parameters()}.values())
    name = Path(options.model).name.removesuffix(".json")
    settings = Settings.part_of(options)
    plan = search_plan(
        costs_by_rows(layers, options.seq, settings),
        machine,
        settings,
        batch=options.batch,
        tokens=options.seq,
        model=name,
        same_order=options.same_order,
    )
    lines = explain(plan, machine, parameters, time.perf_counter() - began, terminal_width())
    print("\n".join(lines), flush=True)
    plan.save(options.out)
    budget = f" --budget {options.budget}" if options.budget else ""
    where = " (where these devices are)" if absent else ""
    print(
        f"written: {options.out}; train with it{where}: spu train --model {options.model} --plan {options.out}{budget}"
    )
    if options.picture is not None:
        from spu.plan.show.gallery import draw_plan

        draw_plan(plan, options.picture)
        print(f"drawn: {options.picture}")
    return plan
