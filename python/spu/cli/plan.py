"""`spu plan`: make a plan from a config and a description of devices; print, draw and write it, or say why not."""

from __future__ import annotations

import dataclasses
import itertools
import os
import time
from pathlib import Path

import torch

from spu.common.units import split_pairs
from spu.cost.blueprint import config_names
from spu.devices.host import host_memory
from spu.devices.manager import Device, DeviceManager, parse_bytes
from spu.devices.speed import measure_device, measure_link
from spu.devices.tiers import Tiers, split_budget
from spu.plan import Plan
from spu.plan.machine import Machine, make_machine, read_speeds
from spu.plan.search import search_plan
from spu.settings import Settings
from spu.train.adapter import lora_options
from spu.train.config import PlanOptions, check_lora, option
from spu.train.model import check_positions, load_config
from spu.train.progress import terminal_width

__all__ = ["declared_devices", "describe_machine", "plan_command"]

_DECLARED = "declared; budget "
_PICTURES = (".png", ".svg", ".pdf")


def declared_devices(devices: str | None, budget: str | None) -> tuple[list[Device], set[str]]:
    """Return the devices to plan for, and the names of those that this machine does not have.

    A GPU that this machine does not have needs a budget, which then is its memory. Default: the devices that the
    budget names; else what is here.

    Raises:
        ValueError: an absent GPU without a budget, or what `DeviceManager` refuses.
    """
    budgets = _split_budget(budget)
    names = [_full(n.strip().lower()) for n in devices.split(",") if n.strip()] if devices else list(budgets)
    if not names or names == ["auto"]:
        return DeviceManager(budget).get_devices("auto"), set()
    gpus = [name for name in names if name.startswith("cuda")]
    twice = next((name for name in gpus if gpus.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"--devices {devices}: {twice} is named twice; GPUs are cuda:0, cuda:1, ...")
    here = {f"cuda:{k}" for k in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)}
    absent = {name for name in gpus if name not in here}
    present = [name for name in names if name not in absent]
    given = {name: size for name, size in budgets.items() if name not in absent}
    made = iter(_present(present, given) if present else [])
    result = [_absent(name, budgets) if name in absent else next(made) for name in names]
    return result, absent | {device.name for device in result if device.description.startswith(_DECLARED)}


def _present(names: list[str], budgets: dict[str, str]) -> list[Device]:
    """Return devices of this machine; CPUs may have budgets that it does not have, and then are declared."""
    total, _ = host_memory()
    large = {k for k, v in budgets.items() if k[:3] == "cpu" and not v.endswith("%") and parse_bytes(v) > total}
    found = DeviceManager({k: v for k, v in budgets.items() if k not in large} or None).get_devices(names)
    result = []
    for device in found:
        key = device.name if device.name in budgets else device.name.split(":")[0]
        if key in large:
            share = parse_bytes(budgets[key]) // (1 if key == device.name else len(found))
            text = f"{_DECLARED}{budgets[key]}"
            device = dataclasses.replace(device, budget_bytes=share, memory_bytes=share, description=text)
        result.append(device)
    return result


def _full(name: str) -> str:
    return name if ":" in name or not name.startswith("cuda") else f"{name}:0"


def _split_budget(budget: str | None) -> dict[str, str]:
    result: dict[str, str] = {}
    for name, value in split_pairs(budget or ""):
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
    return Device(name, torch.device(name), (), 1, size, size, f"{_DECLARED}{given}")


def describe_machine(devices: list[Device], absent: set[str], speed: str | None, precision: str) -> Machine:
    """Return the devices with their speeds: measured where they are here and no speed is given, else nominal."""
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


def with_tiers(machine: Machine, tiers: Tiers) -> Machine:
    """Return the machine with what was measured of the ways to its tiers: a GPU's link in both directions at once, and
    the disk."""
    from spu.cost.measure import time_disk, time_duplex

    gpus = [device for device in machine.devices if device.torch_device.type == "cuda"]
    duplex = time_duplex(gpus[0]) if gpus else machine.duplex
    return dataclasses.replace(
        machine, duplex=duplex, disk=machine.disk if tiers.disk is None else time_disk(tiers.disk)
    )


def _check_files(options: PlanOptions) -> None:
    """Raise ValueError, before anything is measured, for files that could not be written at the end."""
    for name, file in (("--out", options.out), ("--picture", options.picture)):
        if file is None:
            continue
        if Path(file).is_dir():
            raise ValueError(f"{name} {file} is a folder: give a file")
        if not Path(file).parent.is_dir():
            raise ValueError(f"{name} {file}: there is no folder {Path(file).parent}: make it, or give another")
        if not os.access(file if Path(file).exists() else Path(file).parent, os.W_OK):
            raise ValueError(f"{name} {file} cannot be written: give a file in a folder that can be")
    if options.picture is not None and Path(options.picture).suffix.lower() not in _PICTURES:
        raise ValueError(f"--picture {options.picture}: give a name that ends in {', '.join(_PICTURES)}")


def _train_command(options: PlanOptions) -> str:
    """Return the command that trains by the plan. What has no weights would be trained from random ones, and a model by
    its name or with adapters is meant to have some: its folder is then to be filled in."""
    named, weights = options.model in config_names(), any(Path(options.model).glob("*.safetensors"))
    model = "FOLDER" if named or (options.lora is not None and not weights) else options.model
    words = ["spu train --model", model, "--data FILE --plan", options.out]
    for name in ("lora", "lora_kind", "lora_targets", "budget"):
        value = getattr(options, name)
        if value not in (None, "lora"):
            words.append(f"{option(name)} {value}")
    return " ".join(words)


def plan_command(options: PlanOptions) -> Plan:
    """Plan, print, write.

    Raises:
        BudgetError: nothing fits; its text is for people.
        ValueError: bad options.
    """
    from spu.cost.blueprint import blueprint, costs_by_rows, freeze_matrices
    from spu.cost.head import device_type_of
    from spu.plan.show.explain import explain

    _check_files(options)
    check_lora(options)
    check_positions(load_config(options.model), options.seq)
    began = time.perf_counter()
    budget, tiers = split_budget(options.budget)
    devices, absent = declared_devices(options.devices, budget)
    if all(device.torch_device.type != "cpu" for device in devices):
        cpus = [parse_bytes(size) for name, size in _split_budget(budget).items() if name.startswith("cpu")]
        tiers = dataclasses.replace(tiers, host_bytes=sum(cpus))
    machine = describe_machine(devices, absent, options.speed, options.precision)
    if not absent and options.speed is None and options.residency != "resident":
        machine = with_tiers(machine, tiers)
    layers = blueprint(options.model, lora_options(options))
    if options.frozen:
        freeze_matrices(layers)
    parameters = sum({id(p): p.numel() for layer in layers for p in layer.module.parameters()}.values())
    name = Path(options.model).name.removesuffix(".json")
    settings = Settings.part_of(options)
    plan = search_plan(
        costs_by_rows(layers, options.seq, settings, device_type_of(machine.devices)),
        machine,
        settings,
        batch=options.batch,
        tokens=options.seq,
        model=name,
        same_order=options.same_order,
        tiers=tiers,
    )
    lines = explain(plan, machine, parameters, time.perf_counter() - began, terminal_width())
    print("\n".join(lines), flush=True)
    plan.save(options.out)
    where = " (where these devices are)" if absent else ""
    print(f"written: {options.out}; train with it{where}: {_train_command(options)}")
    if options.picture is not None:
        from spu.plan.show.picture import draw_plan

        draw_plan(plan, options.picture)
        print(f"drawn: {options.picture}")
    return plan
