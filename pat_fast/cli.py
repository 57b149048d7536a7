"""The command ``pat-fast``. Whatever is slow to import is imported by the subcommand that needs it."""

from __future__ import annotations

import json
import shlex
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import ConfigError, PatError, in_a_line

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

Inputs = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        metavar="SHAPE[:DTYPE]",
        help="An example input's shape, batch first, such as 1,16:int64. Repeat it for several inputs; "
        "by default an image (1,3,224,224), or what a network of Transformers reads.",
    ),
]
FactoryArgs = Annotated[str, typer.Option(help="Keyword arguments of the factory, a JSON object.")]
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
    out: Annotated[Path | None, typer.Option(help="The run's folder; by default <output_dir>/<name>-<time>.")] = None,
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
            metavar="PACKAGE.MODULE:FACTORY",
            help="A callable that returns the network; or transformers:vit, with any model type.",
            show_default=False,
        ),
    ],
    inputs: Inputs = None,
    args: FactoryArgs = "{}",
    schedule: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|JSON|FILE",
            help="Also show when a schedule prunes: a name such as cubic, or a pruning configuration.",
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Show the groups of channels that go together, their members, and what is frozen and why."""
    with _errors(debug):
        keywords = _json_object(args, "--args")
        example = _examples(inputs)

        from . import build_plan
        from .factory import build_model, default_inputs

        model = build_model(factory, keywords, "FACTORY")
        planned = _schedule(schedule) if schedule is not None else None
        example = example or default_inputs(model)
        _show_plan(build_plan(model, example if len(example) > 1 else example[0]))
        if planned is not None:
            typer.echo(planned)


@app.command()
def bench(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...",
            help="Of the repository's zoo (resnet50, ...), shapes alone (vit_l, llama_1b), PACKAGE.MODULE:FACTORY, or "
            "transformers:vit; by default a few usual ones.",
            show_default=False,
        ),
    ] = None,
    ops: Annotated[
        list[str] | None,
        typer.Option(
            metavar="A,B",
            help="channel_reduce, channel_axpy_, channel_scale_, channel_compact, importance, regularize, step, "
            "training, or all; by default all but training.",
            show_default=False,
        ),
    ] = None,
    backends: Annotated[
        list[str] | None,
        typer.Option(
            metavar="A,B",
            help="reference, cpu, triton, cuda; by default all that run on the device.",
            show_default=False,
        ),
    ] = None,
    dtypes: Annotated[
        list[str] | None,
        typer.Option(
            metavar="A,B",
            help="float32, float64, bfloat16, float16; by default float32, on a GPU bfloat16 as well.",
            show_default=False,
        ),
    ] = None,
    layouts: Annotated[
        list[str] | None,
        typer.Option(
            metavar="A,B",
            help="contiguous, channels_last, for convolutions; by default contiguous.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:0.")] = "cpu",
    inputs: Inputs = None,
    args: FactoryArgs = "{}",
    rounds: Annotated[int | None, typer.Option(help="Timed calls of each function; by default 15.")] = None,
    batch: Annotated[
        int | None, typer.Option(help="Examples of the training step; by default 32, on a GPU 256.")
    ] = None,
    deployed: Annotated[
        bool,
        typer.Option(
            "--deploy",
            help="Instead: latency and peak memory of each model, dense against pruned, at batch 1 and --batch (8).",
        ),
    ] = False,
    runtimes: Annotated[
        list[str] | None,
        typer.Option(
            metavar="A,B",
            help="Of --deploy: eager, channels_last, compile, onnxruntime, int8; by default all.",
            show_default=False,
        ),
    ] = None,
    macs: Annotated[
        float | None, typer.Option(help="Of --deploy: the share of MACs that the pruned model keeps; by default 0.5.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="3 rounds: a glance, not a result.")] = False,
    small: Annotated[bool, typer.Option("--small", help="The zoo's small models: does it all run?")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write everything here.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the shares of bandwidth here.")] = None,
    debug: Debug = False,
) -> None:
    """Time the kernels against this machine's memory, and pruning against Torch-Pruning.

    Nothing gets a ratio before its result was found equal. Exit code 1: a result differed, or something failed.
    """
    with _errors(debug):
        from .bench import Settings, check_writable, render, writing
        from .bench.run import QUICK_ROUNDS, check_models, names
        from .bench.run import run as measure

        if quick and rounds is not None:
            raise ConfigError(f"--quick: expected no --rounds beside it, got {rounds}")
        rounds = QUICK_ROUNDS if quick else Settings.rounds if rounds is None else rounds
        chosen = names(models or (), "MODEL")
        check_models(chosen)
        if (inputs or args != "{}") and not any(":" in name for name in chosen):
            given = "--input" if inputs else "--args"
            raise ConfigError(f"{given}: expected PACKAGE.MODULE:FACTORY beside it; other models have their own inputs")
        if json_file is not None:
            check_writable(json_file, "--json")
        if plot is not None:
            if json_file is not None and plot.resolve() == json_file.resolve():
                raise ConfigError(f"--plot: expected another file than --json writes, got {str(plot)!r} for both")
            from .bench.figure import check_plot, draw

            check_plot(plot)
        if deployed:
            from .bench import deploy

            if plot is not None:
                raise ConfigError("--plot: expected no plot with --deploy, got one; use --json")
            kernels = {"--ops": ops, "--backends": backends, "--dtypes": dtypes, "--layouts": layouts}
            if unread := [option for option, given in kernels.items() if given]:
                raise ConfigError(f"{unread[0]}: expected none with --deploy, which has --runtimes")
            if device != "cpu":
                raise ConfigError(f"--device: expected cpu with --deploy, which measures there alone, got {device!r}")
            wanted = deploy.DeploySettings(
                models=chosen,
                runtimes=names(runtimes or deploy.RUNTIMES, "--runtimes"),
                batches=tuple(dict.fromkeys((1, 8 if batch is None else batch))),
                macs=deploy.DeploySettings.macs if macs is None else macs,
                inputs=_examples(inputs),
                args=_json_object(args, "--args"),
                rounds=rounds,
                small=small,
            )
            measured = deploy.deploy(wanted, lambda line: typer.echo(line, err=True))
            typer.echo(deploy.render(measured))
            if json_file is not None:
                with writing("--json"):
                    measured.write(json_file)
            raise typer.Exit(0 if measured.is_right else 1)
        if runtimes or macs is not None:
            option = "--runtimes" if runtimes else "--macs"
            raise ConfigError(f"{option}: expected --deploy beside it, got none")
        settings = Settings(
            models=chosen,
            ops=names(ops or (), "--ops"),
            backends=names(backends or (), "--backends"),
            dtypes=names(dtypes or (), "--dtypes"),
            device=device,
            layouts=names(layouts or ("contiguous",), "--layouts"),
            inputs=_examples(inputs),
            args=_json_object(args, "--args"),
            rounds=rounds,
            small=small,
            batch=batch,
        )
        result = measure(settings, lambda line: typer.echo(line, err=True))
        typer.echo(render(result))
        if json_file is not None:
            with writing("--json"):
                result.write(json_file)
        if plot is not None:
            with writing("--plot"):
                draw(result, plot)
    if not result.is_right:
        raise typer.Exit(1)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="The folder of a finished pat-fast train.", show_default=False)],
    onnx: Annotated[bool, typer.Option("--onnx", help="Write model.onnx.")] = False,
    int8: Annotated[
        bool, typer.Option("--int8", help="Write model.int8.onnx, after some epochs under fake quantization.")
    ] = False,
    torch_export: Annotated[bool, typer.Option("--torch-export", help="Write model.pt2.")] = False,
    out: Annotated[Path | None, typer.Option(help="The folder to write to; by default the run's.")] = None,
    qat_epochs: Annotated[int, typer.Option(help="Epochs under fake quantization for --int8.")] = 3,
    debug: Debug = False,
) -> None:
    """Write a run's model for other runtimes, each file compared with PyTorch and tested on the run's test images."""
    with _errors(debug):
        chosen = {"onnx": onnx, "int8": int8, "torch-export": torch_export}
        formats = tuple(name for name, wanted in chosen.items() if wanted)
        if not formats:
            raise ConfigError("expected --onnx, --int8 or --torch-export, got none of them")
        if qat_epochs < 0:
            raise ConfigError(f"--qat-epochs: expected an integer >= 0, got {qat_epochs}")

        from .runs import accuracy, export_run, open_run

        opened = open_run(run)
        made = export_run(opened, formats, out or run, qat_epochs, lambda line: typer.echo(line, err=True))
        typer.echo(f"{run / 'model.safetensors'}: test accuracy {accuracy(opened):.2%}")
        for file in made:
            typer.echo(f"{file.report}; test accuracy {file.accuracy:.2%}")


@app.command()
def load(
    path: Annotated[
        Path, typer.Argument(help="The folder of a finished pat-fast train, or a saved model.", show_default=False)
    ],
    factory: Annotated[
        str | None,
        typer.Option("--model", metavar="PACKAGE.MODULE:FACTORY", help="Rebuild the model, which this returns dense."),
    ] = None,
    args: FactoryArgs = "{}",
    debug: Debug = False,
) -> None:
    """Show what a saved model is: where it comes from, what is left of it; and rebuild it, which checks every shape."""
    with _errors(debug):
        from .checkpoint import load as load_model
        from .checkpoint import read_structure
        from .factory import build_model
        from .measure import count_params
        from .runs import CONFIG, WEIGHTS, is_known, read_run

        keywords, named = _json_object(args, "--args"), None
        if path.is_dir():
            config, structure = read_run(path)
            named, file = config.model.factory, path / WEIGHTS
            if factory in (None, named):
                keywords = config.model.args | keywords
            if factory is None and is_known(named):
                factory = named
        else:
            structure, file = read_structure(path), path
        if factory is None and args != "{}":
            raise ConfigError(f"--args: expected --model beside it, whose arguments these are, got {args!r} alone")
        model = None if factory is None else load_model(file, build_model(factory, keywords, "--model"))
        typer.echo(f"{file}\n{structure.summary()}")
        if model is not None:
            typer.echo(f"rebuilt: {count_params(model):,} parameters, every shape fits")
        elif named is not None:
            # Whoever made the folder may have named any code at all.
            typer.echo(f"not rebuilt: its {CONFIG} names {named!r}; give --model {shlex.quote(named)} to run that")


@app.command()
def env(debug: Debug = False) -> None:
    """Show the versions, the devices and the kernel backends in use."""
    with _errors(debug):
        from .env import render

        typer.echo(render())


def _examples(inputs: list[str] | None) -> tuple[torch.Tensor, ...]:
    return tuple(_example(text) for text in inputs or ())


def _schedule(text: str) -> str:
    """The plot of the schedule that a name, a JSON object or a configuration file says."""
    from .config import PruneConfig, load_config
    from .schedules import Schedule

    if text.lstrip().startswith("{"):
        config = load_config(_json_object(text, "--schedule"), PruneConfig)
    elif Path(text).suffix == ".json":
        config = load_config(Path(text), PruneConfig)
    else:
        config = load_config({"schedule": text}, PruneConfig)
    made = Schedule.of(config.schedule, config.start_epoch, config.end_epoch, config.interval)
    return made.plot(config.target_sparsity, config.unit)


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
    try:
        return torch.randn(shape, dtype=dtype) if dtype.is_floating_point else torch.zeros(shape, dtype=dtype)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise ConfigError(f"--input: expected a tensor that can be made, got {text!r}: {in_a_line(error)}") from None


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
        groups.add_row(group.root, f"{group.channels}{of}", "\n".join(_member_lines(group) + found.remarks(group)))
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
    return [f"{module or 'the model'}: {', '.join(tensors)}" for module, tensors in by_module.items()]


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
