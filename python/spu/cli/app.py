"""The ``spu`` command: train, chat, merge, plan, devices, doctor, tune. Each command imports its own heavy modules."""

from __future__ import annotations

import errno
import inspect
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

try:
    import typer
except ImportError:  # the library works without its command line
    packages = "'typer>=0.12' 'rich>=13' 'transformers>=5.0' 'pyyaml>=6'"
    sys.exit(f"spu: the command line needs more packages: pip install {packages}")

from spu.cli.panels import PANELS, panel_of
from spu.cli.words import as_options
from spu.common.elsewhere import meant_by
from spu.common.launched import in_several_processes
from spu.common.options import SWITCH, Options, kind_of
from spu.train.config import PlanOptions, RunOptions, TrainConfig, option
from spu.train.options import read_options

__all__ = ["app", "chat", "devices", "doctor", "guarded", "main", "merge", "options", "plan", "takes", "train", "tune"]

BAD_INPUT, INTERRUPTED = 2, 130

_DISK_FAILED = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG)  # may go well when there is room

app = typer.Typer(
    name="spu",
    help="Train PyTorch models that do not fit the GPU you own, exactly and fast.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show(lines: list[str]) -> None:
    if lines:  # in several processes, rank 0 alone has some
        print("\n".join(lines))


def guarded(command: Callable[[], None]) -> None:
    """Run a command, and end with its exit code and one message; SPU_TRACEBACK=1 shows all.

    0: done, or stopped as a signal has asked; 1: the disk, the machine or another process failed; 2: bad input, also
    one that a stage has refused, or a run that diverged, which would fail again; 130: interrupted at once, by a second
    signal.
    """
    try:
        command()
    except KeyboardInterrupt:
        _fail("interrupted", INTERRUPTED)
    except Exception as error:
        from spu.memory.store import StoreError
        from spu.train.signals import Stopped

        if isinstance(error, Stopped):
            _fail(str(error), 0)
        if os.environ.get("SPU_TRACEBACK"):
            raise
        if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("spu"):
            _fail(f"the package {error.name} is missing: pip install {error.name}", BAD_INPUT)
        if isinstance(error, ValueError):
            cause = error.__cause__  # a checkpoint that could not be written is no bad input
            disk = isinstance(cause, OSError) and cause.errno in _DISK_FAILED
            _fail(f"error: {as_options(str(error))}", 1 if disk else BAD_INPUT)
        from spu.engine.engine import StageError  # imports torch

        if isinstance(error, StageError) and isinstance(error.__cause__, ValueError):
            _fail(f"error: {as_options(str(error.__cause__))}", BAD_INPUT)
        if isinstance(error, StoreError) or isinstance(error.__cause__, StoreError):
            _fail(f"error: {error}", 1)
        lost = isinstance(error, (ConnectionError, TimeoutError)) and error.errno is None  # a process, no path
        if lost or (isinstance(error, StageError) and isinstance(error.__cause__, ConnectionError)):
            _fail(f"error: {error}", 1)
        if isinstance(error, OSError):
            where = "" if error.filename is None else f"{error.filename}: "
            _fail(f"error: {where}{error.strerror or error}: check the path and the room on it", 1)
        raise


def _fail(text: str, code: int) -> None:
    print(f"spu: {text}", file=sys.stderr, flush=True)
    raise typer.Exit(code)


def takes(*classes: type[Options]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for each field of these dataclasses; one that is not named arrives as None.

    Values arrive as texts. The fields define their meaning and the values that are allowed.
    """

    def decorated(command: Callable[..., None]) -> Callable[..., None]:
        made = []
        places = {name: place for place, name in enumerate(" ".join(PANELS.values()).split())}
        fields = [field for options in classes for field in options.own_first()]
        for field in sorted(fields, key=lambda field: places.get(field.name, len(places))):
            kind, flag = kind_of(field), option(field.name)
            start = "" if field.default is None or field.default is False else f"  ({kind.shown(field.default)})"
            kinds: Any = bool if kind.is_flag else list[str] if kind.many else str
            names = f"{flag}/--no-{flag[2:]}" if kind.is_flag else flag
            metavar = None if kind.is_flag else kind.metavar
            panel = panel_of(field.name)
            shown = typer.Option(
                names, help=kind.help + start, metavar=metavar, show_default=False, rich_help_panel=panel
            )
            annotation = Annotated[kinds | None, shown]
            made.append(
                inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
            )
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in made}
        setattr(command, "__signature__", inspect.Signature(made))  # noqa: B010  mypy knows no such attribute
        return command

    return decorated


@app.command()
@takes(TrainConfig, RunOptions)
def train(**given: Any) -> None:
    """Train or fine-tune a decoder on your data, over the devices that there are, into runs/NAME."""

    def command() -> None:
        from spu.cli.train import train_command

        config, options = read_options(given, TrainConfig, RunOptions)
        train_command(config, RunOptions(**options), {name for name, value in given.items() if value is not None})

    guarded(command)


@app.command()
@takes(PlanOptions)
def plan(**given: Any) -> None:
    """Say before training whether a model fits, where each layer goes and how long a step takes."""

    def command() -> None:
        from spu.cli.plan import plan_command

        (options,) = read_options(given, PlanOptions)
        plan_command(PlanOptions(**options))

    guarded(command)


@app.command()
def merge(
    run: Annotated[str, typer.Argument(help="A run's name or folder, or the folder of an adapter that peft wrote.")],
    out: Annotated[str, typer.Option(help="The new folder.")],
    model: Annotated[str | None, typer.Option(help="Of an adapter: the folder of its base model.")] = None,
    runs: Annotated[str, typer.Option(help="Folder of all runs.")] = "runs",
) -> None:
    """Write the model of a run with --lora, its adapters merged into the weights."""

    def command() -> None:
        from spu.cli.merge import merge_command

        merge_command(run, out, model, runs)

    guarded(command)


@app.command()
def chat(
    run: Annotated[str, typer.Argument(help="A run's name or folder, or a model's folder.")],
    max_tokens: Annotated[int, typer.Option(help="Tokens of an answer, at most.", min=1)] = 256,
    temperature: Annotated[float, typer.Option(help="Of the draws; 0: always the likeliest token.", min=0)] = 0.7,
    top_p: Annotated[float, typer.Option(help="Draw among the likeliest ones of this share.", min=0, max=1)] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws.", min=0, max=2**63 - 1)] = 0,
    system: Annotated[str | None, typer.Option(help="First message of a chat.")] = None,
    runs: Annotated[str, typer.Option(help="Folder of all runs.")] = "runs",
) -> None:
    """Try a trained model: talk to it in the terminal, or send it a message through a pipe."""

    def command() -> None:
        from spu.cli.chat import chat_command
        from spu.train.chat import Draw

        chat_command(run, runs, Draw(max_tokens, temperature, top_p, seed), system)

    guarded(command)


@app.command()
def devices(
    devices: Annotated[str, typer.Option(help="As in train.")] = "auto",
    budget: Annotated[str | None, typer.Option(help="As in train.")] = None,
    refresh: Annotated[bool, typer.Option("--refresh", help="Measure, also where results are cached.")] = False,
) -> None:
    """Show the devices: memory, budget, measured speeds and link bandwidths; under torchrun those of all processes."""

    def command() -> None:
        if in_several_processes():
            from spu.cli.ranks import device_lines_of_all

            _show(device_lines_of_all(devices, budget, refresh))
            return
        from spu.cli.devices import device_lines

        _show(device_lines(devices, budget, refresh))

    guarded(command)


@app.command()
def doctor() -> None:
    """Show what works on this machine, what does not, why, and the command that adds it; under torchrun for all."""

    def command() -> None:
        if in_several_processes():
            from spu.cli.ranks import doctor_lines_of_all

            _show(doctor_lines_of_all())
            return
        from spu.cli.devices import doctor_lines

        _show(doctor_lines())

    guarded(command)


@app.command()
def tune(
    device: Annotated[str | None, typer.Option(help="cuda:0, another GPU, or cpu.  (the first GPU, else cpu)")] = None,
    ops: Annotated[str | None, typer.Option(help="Comma-separated products.  (all)")] = None,
    dtypes: Annotated[str | None, typer.Option(help="Comma-separated: fp16, bf16, fp32.  (not fp32 on a GPU)")] = None,
    minutes: Annotated[float | None, typer.Option(help="Stop after this time; a later run on a GPU goes on.")] = None,
    out: Annotated[str | None, typer.Option(help="Another file than the user's table.")] = None,
    dry: Annotated[
        bool, typer.Option("--dry", help="Show what would be measured (on sm_90); measure nothing.")
    ] = False,
) -> None:
    """Measure the kernels on this GPU, or this CPU, and keep the fastest."""

    def command() -> None:
        from spu.cli.tune import tune_command

        tune_command(device, ops, dtypes, minutes, out, dry)

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
    """Run ``spu``: the command, then end the process with the command's exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for index, argument in enumerate(arguments):
        bare = index + 1 == len(arguments) or arguments[index + 1].startswith("-")
        if argument == "--resume" and bare:
            arguments[index] = "--resume=latest"
    arguments = _switches(arguments)
    try:
        code = app(args=arguments or ["--help"], prog_name="spu", standalone_mode=False)
    except Exception as error:
        if not hasattr(error, "format_message"):  # the base class of usage errors moved between typer's versions
            raise
        said = _unknown(error, arguments) or f"{error.format_message().rstrip('.')}{_given(error, arguments)}"
        command = getattr(getattr(error, "ctx", None), "command_path", "spu")
        print(f"spu: error: {said}; see {command} --help", file=sys.stderr)
        code = BAD_INPUT
    sys.exit(code or 0)


def _switches(arguments: list[str]) -> list[str]:
    """Return the arguments with `--sample off` as `--no-sample`: a switch may have a word, as in a YAML file."""
    flags = {
        option(field.name)
        for options in (TrainConfig, RunOptions, PlanOptions)
        for field in options.own_first()
        if kind_of(field).is_flag
    }
    result: list[str] = []
    for argument in arguments:
        name = result[-1] if result else ""
        value = SWITCH.get(argument.lower()) if name in flags else None
        if value is None:
            result.append(argument)
        elif not value:
            result[-1] = f"--no-{name[2:]}"
    return result


def _unknown(error: Any, arguments: list[str]) -> str:
    """Return the words that refuse an option which train or plan does not have; "" for every other error."""
    name, command = getattr(error, "option_name", None), next(iter(arguments), "")
    classes = {"train": (TrainConfig, RunOptions), "plan": (PlanOptions,)}.get(command)
    if not name or classes is None:
        return ""
    known = [option(field.name) for options in classes for field in options.own_first()]
    near = meant_by(name, [k[2:].replace("-", "_") for k in known])
    return f"{name} is not an option of spu {command}; did you mean {option(near)}?" if near else ""


def _given(error: Any, arguments: list[str]) -> str:
    """Return the value that a usage error complains about, which its own text may lack."""
    for name in getattr(getattr(error, "param", None), "opts", ()):
        places = [index for index, argument in enumerate(arguments[:-1]) if argument == name]
        if places:
            return f" (given: {arguments[places[-1] + 1]!r})"
    return ""


if __name__ == "__main__":
    main()
