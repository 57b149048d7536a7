"""The run's folder and what the terminal shows of a run: progress, a line per epoch, the final table."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from .config import TrainConfig
from .errors import ConfigError

Summary = dict[str, Any]

STAGE_STYLES = {"regularize": "cyan", "prune": "yellow", "finetune": "green"}


@dataclass(frozen=True)
class Record:
    """One epoch of one twin. Losses are mean cross-entropies, accuracies lie in 0..1, MACs are per image.

    ``loss`` and ``accuracy`` are those on the images that are followed (``split``), after the epoch's prune.
    """

    epoch: int
    twin: str
    stage: str
    train_loss: float
    train_accuracy: float
    split: str
    loss: float
    accuracy: float
    channels: int | None
    params: int
    macs: int
    lr: float
    seconds: float


def run_directory(config: TrainConfig, out: str | Path | None) -> Path:
    """The folder of a new run; it is not made yet.

    Raises:
        ConfigError: ``out`` is a file, or a folder that has something in it.
    """
    if out is None:
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        base = Path(config.output_dir) / f"{config.name}-{stamp}"
        # Two runs may start within one second.
        return next(path for path in _numbered(base) if not path.exists())
    path = Path(out)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        kind = "a folder with files in it" if path.is_dir() else "a file"
        raise ConfigError(f"--out: expected a new or an empty folder, got {kind}: {path}")
    return path


def _numbered(base: Path) -> Iterator[Path]:
    yield base
    for number in range(2, 10_000):
        yield base.with_name(f"{base.name}-{number}")


class RunLog:
    """Writes the run's folder and shows the run on ``console``; plain lines where that is no terminal."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self.directory = Path()
        self.records: list[Record] = []
        self._notes: set[str] = set()
        self._file: TextIO | None = None
        self._epochs = 0
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._task: TaskID | None = None

    def open(self, directory: Path, config: TrainConfig, batches: int) -> None:
        """Make the run's folder; ``batches`` is how many an epoch has, over all twins."""
        try:
            directory.mkdir(parents=True, exist_ok=True)
            (directory / "config.json").write_text(config.model_dump_json(indent=2) + "\n", encoding="utf-8")
            self._file = (directory / "log.jsonl").open("w", encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"{directory}: expected a folder that can be written, got {error.strerror or error}"
            ) from None
        self.directory, self._epochs = directory, config.epochs
        self.console.print(f"run folder: {directory}", soft_wrap=True)
        self._progress.start()
        self._task = self._progress.add_task("starting", total=batches * config.epochs)

    def note(self, text: str) -> None:
        """A line the user should read, which is no error; shown once."""
        if text in self._notes:
            return
        self._notes.add(text)
        self.console.print(Text(f"note: {text}", style="yellow"), soft_wrap=True)

    def phase(self, text: str) -> None:
        """What the run is doing now."""
        if self._task is not None:
            self._progress.update(self._task, description=text)

    def advance(self) -> None:
        """One batch is done."""
        if self._task is not None:
            self._progress.advance(self._task)

    def record(self, record: Record) -> None:
        """Append to ``log.jsonl``, at once: an interrupted run keeps what it did."""
        self.records.append(record)
        if self._file is not None:
            self._file.write(json.dumps(asdict(record)) + "\n")
            self._file.flush()

    def epoch_line(self, records: list[Record]) -> None:
        """Print one epoch; ``records`` holds the pruned twin, then the dense one (or either alone)."""
        if records[0].epoch == 1:
            self.console.print(Text(_header(both=len(records) > 1), style="bold"), soft_wrap=True)
        self.console.print(_epoch_line(records, self._epochs), soft_wrap=True)

    def interrupted(self) -> None:
        self.console.print(f"interrupted; the log is in {self.directory}", soft_wrap=True)

    def close(self) -> None:
        self._progress.stop()
        if self._file is not None:
            self._file.close()
            self._file = None

    def finish(self, summary: Summary, config: TrainConfig) -> None:
        """Write ``summary.json`` and ``plot.png`` and print the final table."""
        (self.directory / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        self.console.print()
        self.console.print(summary_table(summary, config, self.records))
        try:
            from .plotting import plot_run
        except ImportError:
            self.note("no plot.png: matplotlib is not installed; install it with: pip install matplotlib")
        else:
            path = self.directory / "plot.png"
            plot_run(self.records, path, title=title_of(config), subtitle=_outcome(summary))
        self.console.print(f"{summary['seconds']:.0f} seconds; everything is in {self.directory}", soft_wrap=True)


def title_of(config: TrainConfig) -> str:
    """The title of plot and table: the configuration's, or the names of the model and the data."""
    return config.title or f"{config.model.factory.rpartition(':')[2]} on {config.data.name}"


def _outcome(summary: Summary) -> str:
    """The result in a line, for the plot."""
    dense, pruned = summary["dense"], summary["pruned"]
    if pruned is None:
        return f"test accuracy {dense['accuracy']:.1%}"
    line = f"test accuracy {pruned['accuracy']:.1%} with {pruned['macs'] / dense['macs']:.0%} of the MACs"
    return line if dense["accuracy"] is None else f"{line} (dense: {dense['accuracy']:.1%})"


def human(count: float) -> str:
    """Three digits and a unit: ``272k``, ``10.3M``."""
    for unit in ("", "k", "M", "G", "T"):
        if abs(count) < 999.5 or unit == "T":
            break
        count /= 1000
    if not unit:
        return f"{count:.0f}"
    return f"{count:.{max(0, 2 - len(str(int(abs(count)))) + 1)}f}{unit}"


def _header(both: bool) -> str:
    head = "  epoch  stage         loss accuracy channels params   MACs      s"
    return head + "  | dense: accuracy      s" if both else head


def _epoch_line(records: list[Record], epochs: int) -> Text:
    first = records[0]
    line = Text(f"{first.epoch:>3}/{epochs:<3}  ")
    line.append(f"{first.stage:<10}", style=STAGE_STYLES.get(first.stage, ""))
    channels = "-" if first.channels is None else str(first.channels)
    line.append(
        f" {first.train_loss:>7.4f} {first.accuracy:>8.2%} {channels:>8} {human(first.params):>6} "
        f"{human(first.macs):>6} {first.seconds:>6.2f}"
    )
    for other in records[1:]:
        line.append(f"  |        {other.accuracy:>8.2%} {other.seconds:>6.2f}", style="dim")
    return line


def summary_table(summary: Summary, config: TrainConfig, records: Sequence[Record]) -> Table:
    """Dense against pruned: accuracy, parameters, MACs, latency, and how long each took to train."""
    table = Table(title=title_of(config), title_justify="left", title_style="bold")
    twins = ("dense", "pruned")
    for name in ("", *twins, "pruned / dense"):
        table.add_column(name, justify="right" if name else "left")
    rows: list[tuple[str, str, Callable[[Any], str]]] = [
        ("test accuracy", "accuracy", "{:.2%}".format),
        ("parameters", "params", "{:,}".format),
        ("MACs per image", "macs", "{:,}".format),
        (f"latency, batch {config.latency_batch}", "latency_ms", "{:.2f} ms".format),
    ]
    for label, key, show in rows:
        values = [summary[twin][key] if summary[twin] else None for twin in twins]
        table.add_row(label, *_shown(values, show), _against(key, *values))
    took = [sum(r.seconds for r in records if r.twin == twin) or None for twin in twins]
    table.add_row("training", *_shown(took, "{:.1f} s".format), _against("seconds", *took))
    return table


def _shown(values: Sequence[Any], show: Callable[[Any], str]) -> list[str]:
    return ["-" if value is None else show(value) for value in values]


def _against(key: str, dense: Any, pruned: Any) -> str:
    if dense is None or pruned is None or (key != "accuracy" and not dense):
        return "-"
    return f"{100 * (pruned - dense):+.2f} points" if key == "accuracy" else f"{pruned / dense:.1%}"
