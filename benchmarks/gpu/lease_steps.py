"""The lease's smaller parts.

python benchmarks/gpu/lease_steps.py smoke triton|cuda|facts [--dry]
python benchmarks/gpu/lease_steps.py tune LAYER [--dry]
python benchmarks/gpu/lease_steps.py profile|memcheck [--dry]
python benchmarks/gpu/lease_steps.py one NAME      (for itself: one launch, profiled)
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

if "--dry" in sys.argv:  # read when triton is imported
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from lease_lines import emit
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
CLASSES = ("large", "medium")
# what ncu looks at: the first case of Triton's in a group whose name begins so
PROFILED = {
    "forward": ("forward", ""), "dw": ("dw", ""), "gated": ("gated", ""), "ce": ("ce", ""),
    "adamw": ("memory", "adamw"), "pack": ("memory", "pack int8"),
}  # fmt: skip
MEMCHECK = "found_inf_sees or host_memory or (kind_of_launch and descriptor) or (optimizer_kernels and float16)"


def _checks(device: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Small calls of the public ops with their derivatives: (name, result, fp64 truth)."""
    from spu import ops

    def made(*shape: int) -> Tensor:
        return (torch.randn(shape) / shape[-1] ** 0.5).half()

    def leaf(value: Tensor, wide: bool) -> Tensor:
        return (value.double() if wide else value.to(device)).detach().requires_grad_()

    def both(name: str, call: Callable[..., Tensor], *values: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
        ours, truth = ([leaf(value, wide) for value in values] for wide in (False, True))
        outs = call(*ours), _reference(call, truth)
        for out in outs:
            out.double().square().sum().backward()
        for k, (a, b) in enumerate([outs, *((a.grad, b.grad) for a, b in zip(ours, truth))]):
            yield f"{name} {'result' if k == 0 else f'gradient {k}'}", a, b

    x, w, b, up, down = made(96, 128), made(192, 128), made(192), made(192, 128), made(128, 192)
    yield from both("linear_act", lambda x, w, b: ops.linear_act(x, w, b, "gelu"), x, w, b)
    yield from both("gated_mlp", lambda x, w, u, d: ops.gated_mlp(x, w, u, d), x, w, up, down)
    yield from both("mlp", lambda x, *rest: ops.mlp(x, *rest, "gelu_tanh"), x, w, b, down, made(128))
    target = torch.arange(96) % 192
    yield from both("linear_ce", lambda x, w: ops.linear_cross_entropy(x, w, target.to(x.device)), x, w)
    for codec in ("fp16", "int8"):
        value = x.to(device)
        back = ops.unpack(ops.pack(value, codec), value.shape, value.dtype, codec)
        with ops.use_backend("reference"):
            yield f"codec {codec}", back, ops.unpack(ops.pack(x, codec), x.shape, x.dtype, codec)
    yield "grad_sqnorm", ops.grad_sqnorm([x.float().to(device)]), x.double().square().sum()[None]


def _reference(call: Callable[..., Tensor], values: list[Tensor]) -> Tensor:
    from spu import ops

    with ops.use_backend("reference"):
        return call(*values)


def smoke(name: str, dry: bool) -> int:
    """One small call of each op on a backend against fp64; "facts": versions, the card, the backends."""
    from spu import ops

    if name == "facts":
        return _facts(dry)
    status = ops.backends()[name]
    if not status.available:
        emit({"what": "smoke", "backend": name, "absent": status.reason})
        return int(not dry)
    wrong = 0
    with ops.use_backend(name):
        for what, value, truth in _checks("cpu" if dry else "cuda"):
            error = float((value.detach().cpu().double() - truth.detach()).norm() / truth.detach().norm())
            wrong += not error < 4e-3  # some roundings of fp16; NaN is wrong
            emit({"what": "smoke", "backend": name, "op": what, "error": error})
    return wrong


def _facts(dry: bool) -> int:
    import platform

    import triton

    import spu
    from spu import ops

    row = {"what": "facts", "python": platform.python_version(), "torch": torch.__version__, "cores": os.cpu_count(),
           "triton": triton.__version__, "spu": str(Path(spu.__file__).parent)}  # fmt: skip
    row["backends"] = {name: status.reason or "available" for name, status in ops.backends().items()}
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem,power.limit",
                 "--format=csv,noheader"]  # fmt: skip
        row["card"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    for module in ("_C", "_host", "_cuda"):
        try:
            row[module] = str(Path(str(__import__(f"spu.{module}", fromlist=["x"]).__file__)).name)
        except ImportError as error:
            row[module] = f"missing: {error}"
    emit(row)
    missing = [name for name in ("_C", "_host", "_cuda") if str(row[name]).startswith("missing")]
    return 0 if dry else len(missing)


def tune(layer: str, dry: bool) -> int:
    """Tune the products of one layer, and name its backend; what is measured is kept row by row."""
    from spu.kernels import table
    from spu.kernels.config import PRODUCTS, arch_name
    from spu.tune import run
    from spu.tune.backends import LAYERS

    ops = (
        LAYERS[layer] if layer in LAYERS else tuple(op for op in PRODUCTS if not any(op in o for o in LAYERS.values()))
    )
    if dry:
        for line in run.plan_lines(90, ops, ("fp16",), CLASSES):
            emit({"what": "tune", "plan": line})
        return 0
    path = table.user_path(arch_name(torch.cuda.get_device_capability()))

    def say(line: str) -> None:
        emit({"what": "tune", "line": line})
        if path.is_file() and (out := os.environ.get("SPU_LEASE_OUT")):
            shutil.copy(path, Path(out) / path.name)

    run.tune("cuda:0", ops, ("fp16",), classes=CLASSES, jobs=12, say=say)
    return 0


def profile(dry: bool) -> int:
    """Profile one call of a case of each group by ncu, a process each; what is there is appended."""
    tool, failed = shutil.which("ncu"), 0
    if tool is None and not dry:
        emit({"what": "profile", "absent": "ncu is not on the PATH"})
        return 1
    # Sections, whose names every version knows: a metric that a chip lacks would fail the whole.
    wanted = ("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "WarpStateStats", "Occupancy")
    ncu = [str(tool), "--clock-control", "none", "--target-processes", "all", "--profile-from-start", "off", "--csv"]
    ncu += [word for section in wanted for word in ("--section", section)]
    for name in PROFILED:
        own = [sys.executable, __file__, "one", name]
        if dry:
            failed += one(name, dry)
            continue
        try:
            done = subprocess.run([*ncu, *own], capture_output=True, text=True, timeout=25)
        except subprocess.TimeoutExpired:
            emit({"what": "profile", "group": name, "error": "25 s were not enough"})
            failed += 1
            continue
        failed += done.returncode != 0
        emit({"what": "profile", "group": name, "rc": done.returncode, "lines": done.stdout.count("\n")})
        with (Path(os.environ.get("SPU_LEASE_OUT", ".")) / "profile.csv").open("a") as file:
            file.write(f"# {name}\n{done.stdout}")
    return failed


def one(name: str, dry: bool) -> int:
    """Run a case until it is warm, then once between the profiler's marks."""
    from lease_work import GROUPS, on_card, small

    group, begin = PROFILED[name]
    found = GROUPS[group](small() if dry else on_card())
    case = next(case for case in found if case.peer == "spu triton" and case.group.startswith(begin))
    call = case.make()
    call()
    if dry:
        return 0
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    return 0


def memcheck(dry: bool) -> int:
    """Run a handful of tests under compute-sanitizer, each tensor its own allocation."""
    pytest = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "-q", "-k", MEMCHECK,
              "tests/test_cuda_device.py", "tests/test_triton_gpu.py"]  # fmt: skip
    if dry:
        done = subprocess.run([*pytest, "--collect-only"], cwd=ROOT, capture_output=True, text=True)
        emit({"what": "memcheck", "chosen": done.stdout.count("::")})
        return int(done.returncode != 0 or "::" not in done.stdout)
    if (tool := shutil.which("compute-sanitizer")) is None:
        emit({"what": "memcheck", "absent": "compute-sanitizer is not on the PATH"})
        return 1
    return subprocess.run(
        [tool, "--tool", "memcheck", "--error-exitcode", "9", *pytest, "-p", "lease_lines"], cwd=ROOT
    ).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description="One of the lease's smaller parts.")
    parser.add_argument("part", choices=("smoke", "tune", "profile", "memcheck", "one"))
    parser.add_argument("name", nargs="?", default="")
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.part in ("profile", "memcheck"):
        return int({"profile": profile, "memcheck": memcheck}[options.part](options.dry) > 0)
    return int({"smoke": smoke, "tune": tune, "one": one}[options.part](options.name, options.dry) > 0)


if __name__ == "__main__":
    sys.exit(main())
