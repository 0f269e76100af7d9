"""Compiling ahead of time: what is compiled is what a launch on the GPU looks for in Triton's cache."""

from __future__ import annotations

import hashlib
import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from triton._C.libtriton import get_cache_invalidating_env_vars  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import make_backend  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.cache import get_cache_key  # noqa: E402
from triton.runtime.jit import JITCallable  # noqa: E402

from spu import kernels  # noqa: E402
from spu.kernels import ahead, launch  # noqa: E402
from spu.kernels.arith import INTERPRET  # noqa: E402
from spu.kernels.config import Config  # noqa: E402

pytestmark = pytest.mark.skipif(INTERPRET, reason="interpreted kernels are not compiled")

ARCH, PROCESSORS = 90, 132


class Card:
    """What Triton asks its driver on a machine with such a GPU; nothing is launched."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", ARCH, 32)

    def get_current_device(self) -> int:
        return 1234

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiled:
    """A compiled kernel that does nothing."""

    function = packed_metadata = None

    def launch_metadata(self, *_: object) -> None:
        return None

    def run(self, *_: object) -> None:
        pass


def launches() -> None:
    """A call of most launchers, as they are called on a GPU: aligned, ragged, of one row, with and without options."""
    half = torch.float16
    x, w, b, dz = (torch.empty(s, dtype=half) for s in ((256, 512), (384, 512), (384,), (256, 384)))
    main, sums, one, found = torch.empty(384, 512), torch.empty(384), torch.ones(1), torch.zeros(1)
    target, rows, many = torch.zeros(256, dtype=torch.int64), torch.empty(256), torch.empty(92544, 512, dtype=half)
    for kind in ("tile", "descriptor", "split", "torch"):
        config = Config(kind, 64, 128, 64, split_k=4 if kind == "split" else 1)
        kernels.linear_fwd(x, w, b, "gelu", True, config=config)
        kernels.linear_dz_dx(dz, dz, w, "gelu_tanh", config=config)
        kernels.linear_dw_(dz, x, main, one, found, True, sums, config=config)
    kernels.linear_fwd(x, w)
    kernels.linear_fwd(x[:1, 1:500], w[:, 1:500], None, "silu")
    kernels.linear_dx(dz.bfloat16(), w.bfloat16())
    kernels.gated_linear(x, w, w, "silu")
    kernels.gated_dz(dz, dz, dz, "silu")
    kernels.linear_ce(x, many, target, -100)
    kernels.linear_ce_dz(x, many, target, rows, rows, -100)
    kernels.unpack(kernels.pack(x, "int8", bytes(64)), x.shape, half, "int8")
    kernels.adamw_([x], [rows], [rows], [rows], [rows], [one], one, found, 1e-3, 0.9, 0.999, 1e-8, 0.1)
    kernels.grad_sqnorm([main])


def key_of(source: Any, target: GPUTarget, options: dict[str, Any]) -> str:
    backend, environment = make_backend(target), get_cache_invalidating_env_vars()
    return str(get_cache_key(source, backend, backend.parse_options(dict(options)), environment))


def compiles(keys: list[str], monkeypatch: pytest.MonkeyPatch, place: Any) -> None:
    def compiled(source: Any, target: GPUTarget, options: dict[str, Any], **_: object) -> Compiled:
        keys.append(f"{source.name} {key_of(source, target, options)}")
        return Compiled()

    monkeypatch.setattr(place, "compile", compiled)


@pytest.fixture
def of_the_card(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """Run the launches as on the card and return the keys under which Triton looks in its cache."""

    def run() -> list[str]:
        keys: list[str] = []
        with monkeypatch.context() as patch, launch.standing_for(divmod(ARCH, 10), PROCESSORS):
            patch.setattr(driver, "_active", Card())
            compiles(keys, patch, triton.compiler)
            launches()
        return keys

    return run


def test_what_is_compiled_ahead_has_the_key_of_the_launch(
    of_the_card: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with ahead.recording(ARCH, PROCESSORS) as kept:
        launches()
    made: list[str] = []
    with monkeypatch.context() as patch:
        compiles(made, patch, triton)
        for one in kept:
            ahead.compiled(one, ARCH)
    wanted = of_the_card()
    assert len(wanted) > 25
    assert made == wanted
    folders = [hashlib.sha256(key.split(" ", 1)[1].encode()).hexdigest() for key in wanted]
    assert [one.folder for one in kept] == folders, "what `make gpu-prepare` compares for every launch"


def test_the_processors_are_those_of_the_card() -> None:
    """The columns that a program of the cross-entropy takes are fewer where there are more multiprocessors; 1 is
    compiled in.
    """
    x, w, target = torch.empty(256, 512).half(), torch.empty(16384, 512).half(), torch.zeros(256, dtype=torch.int64)
    found = []
    for processors in (132, 3):
        with ahead.recording(ARCH, processors) as kept:
            kernels.linear_ce(x, w, target, -100)
        found.append(list(kept))
    assert found[0] != found[1]
    assert launch.programs_at_once(torch.device("cpu")) == 3, "only inside a recording"


def test_a_recording_launches_nothing_and_leaves_no_trace() -> None:
    before = driver._active, triton.runtime.JITFunction._do_compile
    with pytest.raises(KeyError), ahead.recording(80, 108):
        kernels.linear_dz(torch.empty(64, 64).half(), torch.empty(64, 64).half(), "gelu")
        raise KeyError
    assert (driver._active, triton.runtime.JITFunction._do_compile) == before


def modules() -> list[Any]:
    return [importlib.import_module(f"spu.kernels.{one.name}") for one in pkgutil.iter_modules(kernels.__path__)]


def test_no_kernel_reads_a_global_constexpr() -> None:
    """Triton 3.6 puts those of a device function into a kernel's name only if the function was named before."""
    held = [
        f"{module.__name__}.{name}"
        for module in modules()
        for name, value in vars(module).items()
        if isinstance(value, triton.language.constexpr)
    ]
    assert held == []


def test_a_kernels_name_does_not_depend_on_those_named_before() -> None:
    found = [value for module in modules() for value in vars(module).values() if isinstance(value, JITCallable)]
    functions = list({id(value): value for value in found}.values())

    def forget() -> None:
        for one in functions:
            one.hash, one.used_global_vals = None, {}

    alone = []
    for one in functions:
        forget()
        alone.append(one.cache_key)
    for order in (functions, functions[::-1]):
        forget()
        for one in order:
            one.cache_key  # noqa: B018
        assert [one.cache_key for one in functions] == alone


def test_a_product_behind_a_derivative_has_a_small_tile_where_rows_are_not_aligned() -> None:
    """Its configuration is looked up before the derivative: the one of aligned rows would spill here."""
    with ahead.recording(80, 108) as kept:
        for inner, columns in ((8, 1280), (9, 1281)):
            dy, weight = torch.empty(1664, inner).half(), torch.empty(inner, columns).half()
            kernels.linear_dz_dx(dy, dy, weight, "silu")
            kernels.linear_dx(dy, weight)
    tiles = {dict(launch.constants)["BM"] for launch in kept if launch.name == "product_kernel"}
    assert tiles == {128, 64}
    large = [launch for launch in kept if dict(launch.constants).get("BM") == 128]
    assert len(large) == 1, "of the aligned rows, the same in both ops"
