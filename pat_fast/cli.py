"""The command ``pat-fast``. Whatever is slow to import is imported by the subcommand that needs it."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import ConfigError, PatError

if TYPE_CHECKING:
    import torch

    from .plan import Group, Plan

BAD_INPUT, INTERRUPTED = 2, 128 + signal.SIGINT

app = typer.Typer(
    name="pat-fast",
    help="Structured pruning of PyTorch networks while they train.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def main() -> None:
    """The entry point of the installed command."""
    app()


def _show_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"pat-fast {version('pat-fast')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    pass


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="The configuration, a JSON file.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="The run's folder [default: <output_dir>/<name>-<time>].")] = None,
    epochs: Annotated[int | None, typer.Option(help="Replaces 'epochs' of the configuration.")] = None,
    seed: Annotated[int | None, typer.Option(help="Replaces 'seed' of the configuration.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Replaces a key, such as optimizer.lr=0.05. Repeatable."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Train a network and prune it while it trains, beside a dense twin."""
    with _errors(debug):
        from .config import TrainConfig, load_config, parse_overrides

        overrides = parse_overrides(settings or ())
        overrides |= {key: value for key, value in (("epochs", epochs), ("seed", seed)) if value is not None}
        resolved = load_config(config, TrainConfig, overrides=overrides)

        from .train import run

        run(resolved, out=out)


@app.command()
def plan(
    factory: Annotated[
        str,
        typer.Argument(
            metavar="PACKAGE.MODULE:FACTORY", help="A callable that returns the network.", show_default=False
        ),
    ],
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            metavar="SHAPE[:DTYPE]",
            help="An example input's shape, batch first, such as 1,16:int64. Repeat it for several inputs. "
            "[default: 1,3,224,224]",
        ),
    ] = None,
    args: Annotated[str, typer.Option(help="Keyword arguments of the factory, a JSON object.")] = "{}",
    debug: Debug = False,
) -> None:
    """Show the groups of channels that go together, their members, and what is frozen and why."""
    with _errors(debug):
        keywords = _json_object(args, "--args")
        example = tuple(_example(text) for text in inputs or ("1,3,224,224",))

        from . import build_plan
        from .factory import build_model

        model = build_model(factory, keywords, "FACTORY")
        _show_plan(build_plan(model, example if len(example) > 1 else example[0]))


@app.command()
def env() -> None:
    """Show the versions, the devices and the kernel backends in use."""
    from .env import render

    typer.echo(render())


def _example(text: str) -> torch.Tensor:
    """A tensor of the shape and type that ``"1,16:int64"`` says: noise, or zeros for integers (they are indices)."""
    import torch

    sizes, _, dtype_name = text.partition(":")
    try:
        shape = [int(size) for size in sizes.split(",")]
    except ValueError:
        shape = []
    if not shape or min(shape) < 1:
        raise ConfigError(f"--input: expected sizes >= 1 such as 1,3,224,224, got {text!r}")
    dtype = getattr(torch, dtype_name or "float32", None)
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"--input: expected a torch type such as int64, got {dtype_name!r}")
    return torch.randn(shape, dtype=dtype) if dtype.is_floating_point else torch.zeros(shape, dtype=dtype)


def _json_object(text: str, option: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{option}: expected a JSON object, got {text!r}: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{option}: expected a JSON object, got {text!r}")
    return value


def _show_plan(found: Plan) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.print(
        f"{found.n_channels} channels in {len(found.groups)} groups; "
        f"{found.params():,} parameters, {found.macs():,} MACs per example",
        soft_wrap=True,
    )
    groups = Table("group", "channels", "members: tensor dimension", show_lines=True)
    for group in found.groups:
        units = len(set(found.unit[group.start : group.stop].tolist()))
        of = "" if units == group.channels else f" in {units} units"
        groups.add_row(group.root, f"{group.channels}{of}", "\n".join(_member_lines(group)))
    if found.groups:
        console.print(groups)
    from .plan.hints import hint

    frozen = Table("frozen", "channels", "why, and what helps")
    for axis in found.frozen:
        frozen.add_row(axis.layer, str(axis.channels), "\n".join(filter(None, (axis.reason, hint(axis.reason)))))
    if found.frozen:
        console.print(frozen)
    for note in found.notes:
        console.print(f"note: {note}", soft_wrap=True, markup=False)


def _member_lines(group: Group) -> list[str]:
    """A line per module: ``bn1: weight 0, bias 0``, the numbers being dimensions."""
    by_module: dict[str, list[str]] = {}
    for name, dimension in group.members:
        module, _, tensor = name.rpartition(".")
        by_module.setdefault(module, []).append(f"{tensor} {dimension}")
    lines = [f"{module or 'the model'}: {', '.join(tensors)}" for module, tensors in by_module.items()]
    return [*lines, f"note: {group.statistic}"] if group.statistic else lines


@contextmanager
def _errors(debug: bool) -> Iterator[None]:
    """End on a PatError with its message and exit code 2, without a traceback."""
    try:
        yield
    except PatError as error:
        if debug:
            raise
        from rich.console import Console
        from rich.text import Text

        Console(stderr=True, highlight=False).print(Text(f"error: {error}", style="red"), soft_wrap=True)
        raise typer.Exit(BAD_INPUT) from None
    except KeyboardInterrupt:
        if debug:
            raise
        raise typer.Exit(INTERRUPTED) from None


if __name__ == "__main__":
    main()
