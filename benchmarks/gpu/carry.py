"""Compile at home what the lease launches, into a Triton cache that is carried along; also on the card, for the rest.

    python benchmarks/gpu/carry.py --cache build/gpu-prepare/triton [--jobs 2] [--only cases tune train cap] [--dry]

Launches are recorded, not listed: the lease's own cases, the candidates of tuning, the tests marked gpu and steps of
its trainings run on CPU tensors that stand for an H100's, on the real launchers (``spu.kernels.ahead``). What computes
on large tensors is left out: a kernel depends on shapes, not on values. Each line counts what a source has recorded,
the last one what was compiled, every kernel under the name that its launch looks for; ``--list FILE`` keeps the
kernels' names and their folders in the cache.
"""

from __future__ import annotations

import argparse
import copyreg
import importlib
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from triton.runtime.jit import JITFunction

ROOT = Path(__file__).resolve().parents[2]
ARCH, PROCESSORS = 90, 132
TUNED_CLASSES = ("large", "medium")  # what the lease tunes, in fp16
_LARGE, _HUGE = 1 << 16, 1 << 24  # elements from which on nothing is computed, and nothing is written


def _kernel(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


# A recorded launch goes to another process: its kernel by name.
copyreg.pickle(JITFunction, lambda one: (_kernel, (one.module, one.__name__)))


class Idle(TorchDispatchMode):
    """Leave out the computation on large CPU tensors: results have the right shapes and no values. spu's ops launch."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name.startswith("spu::"):
            return self._launch(name[5:], func, args, kwargs)
        schema, places = func._schema, {argument.name for argument in func._schema.arguments}
        views = any(value.alias_info and not value.alias_info.is_write for value in schema.returns)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        small = max((t.numel() for t in tensors), default=_LARGE) < _LARGE
        if views or small or (tensors and not any(t.is_floating_point() for t in tensors)):
            return func(*args, **kwargs)
        if schema.is_mutable:
            return _written(schema, args, kwargs)
        absent = tree_map_only(torch.Tensor, _meta, (args, {**kwargs}))
        if "device" in places:
            absent[1]["device"] = torch.device("meta")
        try:
            out = func(*absent[0], **absent[1])
        except (NotImplementedError, RuntimeError):  # results that depend on values, or no meta function
            return func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        if not tensors and (not made or made[0].numel() < _LARGE or not made[0].is_floating_point()):
            return func(*args, **kwargs)  # a small factory, or indices
        return tree_map_only(torch.Tensor, _present, out)

    def _launch(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        from spu.kernels.backend import IMPLEMENTATIONS
        from spu.ops.reference import composed

        short, backend = name, func._overloadname
        if backend != "triton":
            return func(*args, **kwargs)
        if short == "pack":
            from spu.common import wire

            args = (*args, wire.header(args[0].shape, args[0].dtype, args[1]))
        call = IMPLEMENTATIONS.get(short) or composed.implementation(short, "triton")
        with self:
            return call(*args, **kwargs)


def _written(schema: Any, args: Any, kwargs: Any) -> Any:
    """What an op that writes into its arguments returns."""
    places = [k for k, argument in enumerate(schema.arguments) if argument.alias_info and argument.alias_info.is_write]
    found = [args[k] if k < len(args) else kwargs.get(schema.arguments[k].name) for k in places]
    if not schema.returns:
        return None
    return found[0] if len(schema.returns) == 1 else tuple(found)


def _meta(t: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def _present(t: torch.Tensor) -> torch.Tensor:
    if not t.is_meta:
        return t
    here = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype)
    if t.numel() >= _HUGE:
        return here
    return here.fill_(True) if t.dtype == torch.bool else here.zero_()  # zeros are finite: isfinite() is true of them


class OnCpu(TorchFunctionMode):
    """Take "cuda" for the CPU, in code that was written for a card."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.pin_memory:
            return args[0]

        def here(value: Any) -> Any:
            is_card = (isinstance(value, str) and value.startswith("cuda")) or (
                isinstance(value, torch.device) and value.type == "cuda"
            )
            return torch.device("cpu") if is_card else value

        args = tuple(map(here, args))
        return func(*args, **{key: here(value) for key, value in (kwargs or {}).items()})


@contextmanager
def _standing(kept: dict[Any, None], idle: bool = True) -> Iterator[None]:
    from spu.kernels import ahead
    from spu.ops import dispatch

    with ahead.recording(ARCH, PROCESSORS) as found:
        dispatch.status_of("triton")  # taken for there from now on
        with Idle() if idle else nullcontext():
            yield
        kept |= found


@contextmanager
def _library(takes: bool) -> Iterator[None]:
    """Let cuBLASLt take every product, or none: what is launched around it differs."""
    from spu.kernels import library

    serves, call = library.serves, library._call
    library.serves, library._call = lambda *_: takes, lambda *_, **__: takes
    try:
        yield
    finally:
        library.serves, library._call = serves, call


def of_cases(kept: dict[Any, None], small: bool) -> list[str]:
    """Record every case of ours; return what could not be called here, in words."""
    sys.path.insert(0, str(Path(__file__).parent))
    import lease_work

    from spu import ops

    at = lease_work.small() if small else lease_work.on_card("cpu", numel=1 << 22)
    wrong = {}
    for takes in (False, True):
        for group, make in lease_work.GROUPS.items():
            for case in list(make(at)):
                if not case.peer.startswith("spu") or case.peer == "spu cuda":
                    continue
                try:
                    with _library(takes), _standing(kept), ops.use_backend("triton"):
                        case.make()()
                except Exception as error:
                    what = f"{group}: {case.group} {case.shape} by {case.peer}"
                    wrong[what] = f"{what}: {type(error).__name__}: {str(error)[:200]}"
    return list(wrong.values())


def of_tuning(kept: dict[Any, None], small: bool) -> list[str]:
    """Record every candidate of the rows that the lease tunes."""
    from spu.kernels.config import PRODUCTS
    from spu.tune.backends import LAYERS
    from spu.tune.calls import REPRESENTATIVE, call_of, candidates

    wrong = []
    tuned = [op for op in PRODUCTS if any(op in parts for parts in LAYERS.values())]
    for op in tuned[:1] if small else tuned:
        for shape_class in TUNED_CLASSES[:1] if small else TUNED_CLASSES:
            for config in candidates(op, torch.float16, shape_class, ARCH):
                try:
                    with _standing(kept):
                        call_of(op, torch.float16, REPRESENTATIVE[shape_class], torch.device("cpu"))(config)
                except Exception as error:
                    wrong.append(f"tune: {op} {shape_class} {config}: {type(error).__name__}: {error}")
    return wrong


def _of_steps(module: str, kept: dict[Any, None], small: bool) -> list[str]:
    """Record a step of one of the lease's trainings, with one layer: the others launch the same."""
    sys.path.insert(0, str(Path(__file__).parent))
    from spu.ops import cross_entropy

    cross_entropy._CHUNK_BYTES.clear()  # rows of a vocabulary's loss at a time: as many as on a card
    try:
        with _standing(kept, idle=False):
            importlib.import_module(module).recorded_step(small)
    except Exception as error:
        return [f"{module}: {type(error).__name__}: {error}"]
    return []


class _Tests:
    """A pytest plugin: the tests marked gpu run on CPU tensors, on kernels that are recorded; nothing is compared."""

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        for item in items:
            item.own_markers = [mark for mark in item.own_markers if mark.name not in ("skip", "timeout")]


def of_tests(kept: dict[Any, None], small: bool) -> list[str]:
    """Record the tests' launches. Their comparisons have no values: python -O takes the asserts out."""
    import pytest

    sys.path.insert(0, str(ROOT / "tests"))
    import numeric

    for name in ("assert_equal", "assert_close_to_truth"):
        setattr(numeric, name, lambda *_, **__: None)
    torch.testing.assert_close = lambda *_, **__: None
    torch.cuda.get_device_capability = lambda *_: divmod(ARCH, 10)
    torch.cuda.synchronize = lambda *_: None
    with _standing(kept), OnCpu():
        pytest.main(
            ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--assert=plain", "-W", "ignore", "--no-header",
             "--tb=line", "-k", "not training_job" + (" and kind_of_launch" if small else ""),
             str(ROOT / "tests/test_triton_gpu.py")],
            plugins=[_Tests()],
        )  # fmt: skip
    return []


SOURCES: dict[str, Callable[[dict[Any, None], bool], list[str]]] = {
    "cases": of_cases, "tune": of_tuning, "train": partial(_of_steps, "lease_train"),
    "cap": partial(_of_steps, "lease_cap"), "tests": of_tests,
}  # fmt: skip


def _record(source: str, small: bool) -> tuple[list[Any], list[str]]:
    """Record in a process of its own: a library, or a mode, that a source needs does not reach the others."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "launches"
        command = [sys.executable, "-O", __file__, "--record", source, "--into", str(file)]
        done = subprocess.run([*command, *(["--dry"] if small else [])], capture_output=True, text=True)
        if not file.exists():
            return [], [f"{source}: recording ended with {done.returncode}: {done.stderr[-2000:]}"]
        return pickle.loads(file.read_bytes())  # type: ignore[no-any-return]


def _compile(launch: Any) -> tuple[str, str]:
    """Compile one launch, and the C function that Triton launches it by; return its folder, or what was wrong."""
    torch.set_num_threads(1)
    from spu.kernels import ahead

    try:
        made = ahead.compiled(launch, ARCH)
    except Exception as error:
        return "", f"{launch.name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    _stub(made)
    if made.hash != launch.folder:
        return "", f"{launch.name}: compiled as {made.hash[:12]}, but its launch looks for {launch.folder[:12]}"
    return made.hash, ""


def _stub(made: Any) -> None:
    """Let Triton build the C function that launches a kernel; where this cannot be, the card does it."""
    from triton.backends.nvidia import driver

    if "TRITON_LIBCUDA_PATH" not in os.environ:
        return
    sys.setdlopenflags(os.RTLD_LAZY)  # the driver's functions are not here
    try:
        driver.CudaUtils()
        driver.CudaLauncher(made.src, made.metadata)
    except Exception as error:
        warnings.warn(f"a launcher was not built: {type(error).__name__}: {str(error)[:200]}", stacklevel=1)


def main() -> int:
    parser = argparse.ArgumentParser(description="Record the lease's launches and compile them.")
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--list", type=Path)
    parser.add_argument("--dry", action="store_true", help="few and small launches")
    parser.add_argument("--record", choices=SOURCES, help="for itself: record one source")
    parser.add_argument("--into", type=Path)
    options = parser.parse_args()
    if options.record:
        kept: dict[Any, None] = {}
        wrong = SOURCES[options.record](kept, options.dry)
        options.into.write_bytes(pickle.dumps((list(kept), wrong)))
        return 0
    began = time.monotonic()
    if options.cache:
        os.environ["TRITON_CACHE_DIR"] = str(options.cache.resolve())
    wrong, folders, compiling = list[str](), dict[str, str](), dict[Any, Future[tuple[str, str]]]()
    recorders = ThreadPoolExecutor(min(options.jobs, len(options.only)))
    with recorders, ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        recording = {recorders.submit(_record, source, options.dry): source for source in options.only}
        for done in as_completed(recording):
            launches, said = done.result()
            wrong += said
            row = {"recorded": recording[done], "launches": len(launches), "wrong": said}
            print(json.dumps({**row, "seconds": round(time.monotonic() - began)}), flush=True)
            for launch in launches:
                if launch not in compiling:
                    compiling[launch] = pool.submit(_compile, launch)
        for launch, made in compiling.items():
            folder, error = made.result()
            if error:
                wrong.append(error)
            else:
                folders[folder] = launch.name
    launches = list(compiling)
    if options.list:
        options.list.write_text(json.dumps(folders, indent=0, sort_keys=True) + "\n")
    took = round(time.monotonic() - began, 1)
    print(
        json.dumps({"launches": len(launches), "compiled": len(folders), "wrong": wrong, "seconds": took}), flush=True
    )
    return 0 if folders else 1


if __name__ == "__main__":
    sys.exit(main())
