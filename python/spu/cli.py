"""The `spu` command: train, plan, devices, doctor, tune. Heavy modules are imported by the command that needs them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

try:
    import typer
except ImportError:  # the library works without its command line
    sys.exit("spu: the command line needs more packages: pip install 'typer>=0.12' 'rich>=13' 'transformers>=5.0'")

BAD_INPUT, INTERRUPTED = 2, 130
_CODECS = "auto, none, fp16, bf16, int8, int4, fp8_e4m3 or fp8_e5m2"  # spu.ops has them, but imports torch

app = typer.Typer(
    name="spu",
    help="Train PyTorch models that do not fit the card you own, exactly and fast.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def guarded(command: Callable[[], None]) -> None:
    """Run a command; a user's mistake becomes one message and exit code 2, Ctrl-C 130. SPU_TRACEBACK=1 shows all."""
    try:
        command()
    except KeyboardInterrupt:
        _fail("interrupted", INTERRUPTED)
    except Exception as error:
        from spu.job.stop import Stopped

        if isinstance(error, Stopped):
            _fail(str(error), error.code)
        if os.environ.get("SPU_TRACEBACK"):
            raise
        if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("spu"):
            _fail(f"the package {error.name} is missing: pip install {error.name}", BAD_INPUT)
        if isinstance(error, ValueError):
            _fail(f"error: {error}", BAD_INPUT)
        if isinstance(error, OSError):
            _fail(f"error: {error.filename or ''}: {error.strerror or error}: check the path and the room on it", 1)
        raise


def _fail(text: str, code: int) -> None:
    print(f"spu: {text}", file=sys.stderr, flush=True)
    raise typer.Exit(code)


def _named(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


@app.command()
def train(
    model: Annotated[
        str | None, typer.Option(help="Folder or config.json of a Hugging Face decoder. Default: a 3M InternLM3.")
    ] = None,
    data: Annotated[list[str] | None, typer.Option(help="Text file. Default: Python's language reference.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the new run. Default: the time.")] = None,
    out: Annotated[str, typer.Option(help="Folder of all runs.")] = "runs",
    resume: Annotated[str | None, typer.Option(help="Go on with a run: its name or folder; alone: the latest.")] = None,
    devices: Annotated[str | None, typer.Option(help="auto, cpu, cpu:0,cpu:1, cuda:0,cpu, ...  (auto)")] = None,
    budget: Annotated[str | None, typer.Option(help="Memory to use, e.g. cuda:0=8GB,cpu=24GB.  (what is free)")] = None,
    schedule: Annotated[
        str | None, typer.Option(help="1f1b, gpipe, interleaved, zb, zbv, layer_outer, auto.  (1f1b)")
    ] = None,
    microbatches: Annotated[str | None, typer.Option(help="Microbatches of a pipeline round, or auto.  (8)")] = None,
    accumulate: Annotated[int | None, typer.Option(help="Pipeline rounds for one update.  (1)")] = None,
    precision: Annotated[str | None, typer.Option(help="fp16, bf16 or fp32.  (fp16)")] = None,
    transfer: Annotated[str | None, typer.Option(help=f"Between stages: {_CODECS}.  (int8)")] = None,
    recompute: Annotated[str | None, typer.Option(help="Recompute activations: auto, on or off.  (auto)")] = None,
    steps: Annotated[int | None, typer.Option(help="Updates; with --resume, more than before.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Or: tokens to train on.  (786432)")] = None,
    minutes: Annotated[float | None, typer.Option(help="Or: minutes to fill.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.  (0.002)")] = None,
    warmup: Annotated[float | None, typer.Option(help="Share of the steps that warm up.  (0.05)")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="AdamW's.  (0.1)")] = None,
    max_grad_norm: Annotated[float | None, typer.Option(help="Clip the gradient norm to this.  (1.0)")] = None,
    seq: Annotated[int | None, typer.Option(help="Tokens of a sequence.  (128)")] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences of a step.  (8)")] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, batches and dropout.  (0)")] = None,
    init_scale: Annotated[float | None, typer.Option(help="First loss scale (fp16).  (65536)")] = None,
    growth_interval: Annotated[int | None, typer.Option(help="Good steps before the scale doubles.  (200)")] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.  (100)")] = None,
    evals: Annotated[int | None, typer.Option(help="Points of the validation curve.  (10)")] = None,
    plan: Annotated[
        str | None, typer.Option(help="A plan.json of spu plan: devices, schedule, stages as it says.")
    ] = None,
    replan: Annotated[
        bool | None, typer.Option("--replan", help="After the second step, place the layers again by what it took.")
    ] = None,
    reference: Annotated[bool, typer.Option("--reference", help="Train in plain fp32 PyTorch instead.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Train both ways and print the difference.")] = False,
    sample: Annotated[bool, typer.Option("--sample/--no-sample", help="Let the model write some lines.")] = True,
) -> None:
    """Train a decoder on a text, in a pipeline over the devices, into runs/NAME."""
    options = {key: value for key, value in locals().items() if key not in _NOT_SETTINGS}

    def command() -> None:
        from spu.job.command import train_command
        from spu.job.config import read_count

        options["microbatches"] = read_count("microbatches", microbatches)
        options["data"] = data[-1] if data else None

        train_command(
            _named(options),
            out=out,
            name=name,
            resume=resume,
            plan=plan,
            only_reference=reference,
            compare=compare,
            sample=sample,
            further_data=tuple(data or ())[:-1],
        )

    guarded(command)


@app.command()
def plan(
    model: Annotated[
        str, typer.Option(help="A config that comes with spu (internlm2-1.8b, -7b, -20b), a config.json, or a folder.")
    ] = "internlm2-1.8b",
    devices: Annotated[
        str | None, typer.Option(help="cuda:0,cpu, cpu:0,cpu:1, ... need not be here.  (those of the budget)")
    ] = None,
    budget: Annotated[str | None, typer.Option(help="Memory to use, e.g. cuda:0=8GB,cpu=64GB.  (what is free)")] = None,
    speed: Annotated[
        str | None, typer.Option(help="Of devices that are not here: cuda:0=rtx3070,cpu=200GFLOPS.  (nominal)")
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences of a step.")] = 8,
    seq: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 2048,
    accumulate: Annotated[int, typer.Option(help="Pipeline rounds for one update.")] = 1,
    microbatches: Annotated[str, typer.Option(help="A number, or auto.")] = "auto",
    schedule: Annotated[str, typer.Option(help="1f1b, gpipe, interleaved, zb, zbv, layer_outer, or auto.")] = "auto",
    precision: Annotated[str, typer.Option(help="fp16, bf16 or fp32.")] = "fp16",
    transfer: Annotated[str, typer.Option(help=f"Between stages: {_CODECS}.")] = "auto",
    recompute: Annotated[str, typer.Option(help="Recompute activations: auto, on or off.")] = "auto",
    same_order: Annotated[bool, typer.Option("--same-order", help="Use every device, in the order given.")] = False,
    out: Annotated[str, typer.Option(help="Where the plan is written.")] = "plan.json",
    picture: Annotated[str | None, typer.Option(help="Draw it: a .png, .svg or .pdf file.")] = None,
) -> None:
    """Say before training whether a model fits, where each layer goes and how long a step takes."""
    given = dict(locals())

    def command() -> None:
        from spu.job.planning import PlanOptions, plan_command

        options = {key: value for key, value in given.items() if key not in ("out", "picture")}
        plan_command(PlanOptions(**options), out, picture)

    guarded(command)


_NOT_SETTINGS = ("name", "out", "resume", "plan", "reference", "compare", "sample")


@app.command()
def devices(
    devices: Annotated[str, typer.Option(help="As in train.")] = "auto",
    budget: Annotated[str | None, typer.Option(help="As in train.")] = None,
    refresh: Annotated[bool, typer.Option("--refresh", help="Measure again instead of remembering.")] = False,
) -> None:
    """Show the devices: memory, budget, measured speeds and link bandwidths."""

    def command() -> None:
        from spu.job.hardware import device_lines

        print("\n".join(device_lines(devices, budget, refresh)))

    guarded(command)


@app.command()
def doctor() -> None:
    """Show what works on this machine, what does not, why, and the command that adds it."""

    def command() -> None:
        from spu.job.hardware import doctor_lines

        print("\n".join(doctor_lines()))

    guarded(command)


@app.command()
def tune(
    device: Annotated[str, typer.Option(help="Which card.")] = "cuda:0",
    ops: Annotated[str | None, typer.Option(help="Comma-separated products.  (all)")] = None,
    dtypes: Annotated[str, typer.Option(help="Comma-separated: fp16, bf16, fp32.")] = "fp16,bf16",
    minutes: Annotated[float | None, typer.Option(help="Stop after this time; a later run goes on.")] = None,
    out: Annotated[str | None, typer.Option(help="Another file than the user's table.")] = None,
    dry: Annotated[bool, typer.Option("--dry", help="Show what would be measured on sm_90; measure nothing.")] = False,
) -> None:
    """Measure the kernels' configurations on this card and keep the fastest."""

    def command() -> None:
        from pathlib import Path

        from spu import tune as tuning
        from spu.kernels.config import PRODUCTS

        names = tuple(ops.split(",")) if ops else PRODUCTS
        kinds = tuple(dtypes.split(","))
        if dry:
            print("\n".join(tuning.plan_lines(90, names, kinds)))
            return
        seconds = None if minutes is None else 60 * minutes
        path = tuning.tune(device, names, kinds, out=None if out is None else Path(out), seconds=seconds)
        print(f"written to {path}")

    guarded(command)


def _show_version(value: bool) -> None:
    if value:
        from spu import __version__

        print(f"spu {__version__}")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it.")] = False,
) -> None:
    pass


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `spu`: runs the command and ends the process with the command's exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for index, argument in enumerate(arguments):
        bare = index + 1 == len(arguments) or arguments[index + 1].startswith("-")
        if argument == "--resume" and bare:
            arguments[index] = "--resume=latest"
    try:
        code = app(args=arguments or ["--help"], prog_name="spu", standalone_mode=False)
    except Exception as error:
        if not hasattr(error, "format_message"):  # the base class of usage errors moved between typer's versions
            raise
        print(f"spu: error: {error.format_message()}{_given(error, arguments)}; see spu --help", file=sys.stderr)
        code = BAD_INPUT
    sys.exit(code or 0)


def _given(error: Any, arguments: list[str]) -> str:
    """The value that a usage error complains about, which its own text may lack."""
    for name in getattr(getattr(error, "param", None), "opts", ()):
        places = [index for index, argument in enumerate(arguments[:-1]) if argument == name]
        if places:
            return f" (given: {arguments[places[-1] + 1]!r})"
    return ""


if __name__ == "__main__":
    main()
