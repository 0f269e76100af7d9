"""What all tests share: the gpu marker, fixed seeds, few threads, and a check that no thread outlives its test."""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import os
import random
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Before OpenMP is loaded: by default its threads spin where they wait, a quarter of the suite's work on two busy cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

with contextlib.suppress(ImportError):  # the bars of other packages, also switched off, start a thread that never ends
    from tqdm import tqdm

    tqdm.monitor_interval = 0

from thorough import ALL

THREADS = 2  # the suite is meant for two cores, and bit-equality tests compare at equal thread counts
SETTLE_SECONDS = 2.0  # a worker that was told to stop may still be on its way out when the test returns


def seed_torch(seed: int) -> None:
    """torch.manual_seed also queues a seed for every absent accelerator, with a formatted stack each: milliseconds."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


class TorchRandom:
    """torch's default generator in the shape hypothesis wants, so that a failing example replays with its tensors."""

    seed = staticmethod(seed_torch)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


TORCH_RANDOM = TorchRandom()  # hypothesis keeps a weak reference
if importlib.util.find_spec("hypothesis") is not None:  # the tests on a GPU run without it
    hypothesis = importlib.import_module("hypothesis")
    hypothesis.register_random(TORCH_RANDOM)
    # The same examples on every run: a change is judged by its own tests, and `make fuzz` is there to look further.
    hypothesis.settings.register_profile("suite", derandomize=True)
    hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(min(THREADS, torch.get_num_threads()))
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        from interpreting import prepare

        prepare()
    config.addinivalue_line("markers", "thorough(why): run by `make test-all` alone; why it may be")
    config.addinivalue_line("markers", "leaks_threads: exempt from the check that no thread outlives its test")


# Files of some minutes: begun first, none of them is still running alone when all others are done.
LONG = (
    "test_cuda_build", "test_triton_kernels", "test_cpu_isa", "test_cli", "test_cuda_kernels", "test_train_crashes",
    "test_train_export",
    "test_nn_accelerate", "test_trainer_retry_limited", "test_cli_plan", "test_guides", "test_engine_local",
    "test_checkpoint_reading", "test_model_convert_decoder", "test_fuzz", "test_ops_cross_entropy",
    "test_memory_device_store", "test_common_interrupts", "test_train_keep", "test_train_chat", "test_packaging",
    "test_distributed_engine", "test_distributed_gather", "test_train_ranks", "test_settings",
    "test_train_adapter", "test_integrations_hf_trainer", "test_planning_traces", "test_equivalence",
    "test_train_tensorboard", "test_model_families", "test_memory_activations", "test_cost_count",
    "test_engine_streaming_grid", "test_engine_crossing", "test_ops_dispatch", "test_trainer_retry",
    "test_memory_disk_faults", "test_precision_differential", "test_model_traced", "test_engine_head_loss",
    "test_planning_gates", "test_ops_linear", "test_distributed_ties", "test_engine_streaming_host",
    "test_trainer_adapter", "test_trainer_planner", "test_distributed_job", "test_common_heap",
)  # fmt: skip
PLACE = {name: place for place, name in enumerate(LONG)}


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What is imported stays: it is not looked through for garbage meanwhile, a fifth of the time, nor by the tests."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # at its end the interpreter looks through everything: Triton's library tells of what it does not


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: PLACE.get(item.path.stem, len(LONG)))
    for item in items:
        mark = item.get_closest_marker("thorough")
        if mark is not None and not ALL:
            item.add_marker(pytest.mark.skip(reason=f"{mark.args[0]}; make test-all runs it"))
    if torch.cuda.is_available():
        return
    reason = f"needs a CUDA device; torch {torch.__version__} sees none here"
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True, scope="module")
def what_stays_is_not_looked_through() -> Iterator[None]:
    """What a file leaves for good, imports and caches, is no collector's work in the next ones: a second each time."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_other_scalers(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a GradScaler lives, fp32 layers are fused (`spu.nn.fp32`): those of other tests must not choose here."""
    if "spu.ops.adopters" in sys.modules:
        monkeypatch.setattr(sys.modules["spu.ops.adopters"], "_ADOPTERS", weakref.WeakSet())


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the suite measures is neither taken from the user's cache nor left there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPU_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


# Files whose subject is the counting, or what it calls and warns of.
COUNTED_ANEW = ("test_cost_count", "test_cost_blueprint", "test_trainer_planner")


@pytest.fixture(autouse=True, scope="module")
def costs_counted_once(request: pytest.FixtureRequest) -> Iterator[None]:
    """Trainers count the costs of a model once in a process, not in each test."""
    # A process without trainers, as those for one instruction set, need not import them for this: seconds.
    if request.path.stem in COUNTED_ANEW or "spu.trainer.planner" not in sys.modules:
        yield
        return
    from counted import counted_once

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("spu.trainer.planner.model_costs", counted_once)
        yield


# Files that look at pictures of a run.
PICTURED = ("test_cli", "test_train_report", "test_plan_show_picture")


def unrendered(draw: Callable[..., None]) -> Callable[..., None]:
    """A function that draws a picture up to the last line of ours: an empty file is saved in its place."""

    def drawn(*args: Any, **kwargs: Any) -> None:
        from matplotlib.figure import Figure

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Figure, "savefig", lambda figure, path, **how: Path(path).write_bytes(b""))
            draw(*args, **kwargs)

    return drawn


@pytest.fixture(autouse=True, scope="module")
def pictures_unrendered(request: pytest.FixtureRequest) -> Iterator[None]:
    """Rendering two pictures is a fifth of a small run's time, and matplotlib's alone."""
    results = sys.modules.get("spu.train.results")
    with pytest.MonkeyPatch.context() as patch:
        if results is not None and request.path.stem not in PICTURED:
            for name in ("draw_timeline", "draw_loss"):
                patch.setattr(results, name, unrendered(getattr(results, name)))
        yield


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers in every test, whichever tests ran before it."""
    random.seed(0)
    seed_torch(0)


@pytest.fixture(autouse=True)
def thread_count() -> Iterator[None]:
    """A test that changes torch's thread count does not change the next test's."""
    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)


@pytest.fixture
def one_thread(thread_count: None) -> None:
    """Torch's operators run on one thread: the bits of a sum depend on how many there are."""
    torch.set_num_threads(1)


@pytest.fixture
def reference(one_thread: None) -> Iterator[None]:
    """One thread and the reference backend: sums are then those of plain torch, bit for bit."""
    from spu.ops import use_backend

    with use_backend("reference"):
        yield


@pytest.fixture(autouse=True)
def no_leaked_threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a test that leaves a Python thread running: a pipeline worker must end with its trainer."""
    before = set(threading.enumerate())
    yield
    if request.node.get_closest_marker("leaks_threads") is not None:
        return
    deadline = time.monotonic() + SETTLE_SECONDS
    while leaked := [t for t in threading.enumerate() if t not in before and t.is_alive()]:
        if time.monotonic() > deadline:
            pytest.fail("threads outlive the test: " + ", ".join(t.name for t in leaked))
        time.sleep(0.02)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt: a shell's background jobs inherit it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a checkpoint is saved: in a folder that is not there yet."""
    return tmp_path / "run" / "checkpoint"


@pytest.fixture
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of many saves: waiting for the disk is most of a small save's time."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
