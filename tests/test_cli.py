from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from pat_fast.cli import app

pytest.importorskip("sklearn")

CONFIG: dict[str, Any] = {
    "name": "tiny",
    "model": {"factory": "pat_fast.models:resnet20", "args": {"width": 4}},
    "data": {"name": "digits", "size": 8, "batch_size": 128, "test_fraction": 0.5},
    "optimizer": {"lr": 0.05},
    "epochs": 2,
    "device": "cpu",
    "threads": 1,
    "pruning": {"start_epoch": 0, "end_epoch": 1, "target_sparsity": 0.3},
}
ROOT = Path(__file__).parent.parent


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(CONFIG))
    return path


def invoke(*args: str | Path) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def command(*args: str | Path) -> list[str]:
    return [sys.executable, "-m", "pat_fast", *map(str, args)]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


def test_help_names_the_commands() -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    for name in ("train", "plan", "bench", "env", "--version"):
        assert name in result.stdout


def test_the_command_line_imports_nothing_slow_by_itself() -> None:
    code = (
        "import sys, pat_fast; package = set(sys.modules); import pat_fast.cli;"
        "print({'torch', 'pydantic', 'matplotlib', 'sklearn', 'numpy'} & (set(sys.modules) - package))"
    )
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, capture_output=True, text=True, env=environment(), check=True)
    assert done.stdout.strip() == "set()"


def test_a_run_as_a_stranger_starts_it(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = subprocess.run(
        command("train", config, "--out", out, "--epochs", "1", "--seed", "3", "--set", "optimizer.lr=0.01"),
        capture_output=True,
        text=True,
        env=environment(),
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert "1/1" in done.stdout
    resolved = json.loads((out / "config.json").read_text())
    assert (resolved["epochs"], resolved["seed"], resolved["optimizer"]["lr"]) == (1, 3, 0.01)
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary) == {"dense", "pruned", "seconds"}


def test_an_interrupt_ends_quietly_and_keeps_the_log(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(
        command("train", config, "--out", out, "--epochs", "10000"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored by what a shell puts behind
    )
    log = out / "log.jsonl"
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        if log.exists() and log.read_text().count("\n") >= 2:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert "Traceback" not in stderr
    assert f"interrupted; the log is in {out}" in stdout
    assert all(json.loads(line)["epoch"] for line in log.read_text().splitlines())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["train", "digit.json"], "digit.json: expected a JSON configuration file, got no such file"),
        (["train", "tiny.json", "--set", "pruning.target_sparsity=1.5"], "pruning.target_sparsity: expected"),
        (["train", "tiny.json", "--set", "pruning.taget_sparsity=0.5"], "did you mean 'target_sparsity'"),
        (["train", "tiny.json", "--epochs", "0"], "epochs: expected an integer >= 1, got 0"),
        (["train", "tiny.json", "--set", "epochs"], "--set: expected key=value"),
        (["train", "tiny.json", "--out", "."], "--out: expected a new or an empty folder"),
        (["train", "tiny.json", "--set", "model.args.width=-1"], "to succeed, got RuntimeError"),
        (["plan", "pat_fast.models"], "expected 'package.module:callable', got 'pat_fast.models'"),
        (["plan", "pat_fast.models:resnet21"], "did you mean 'resnet20'"),
        (["plan", "pat_fast.models:resnet20", "--input", "1,x"], "--input: expected sizes >= 1"),
        (["plan", "pat_fast.models:resnet20", "--input", "1,2:float31"], "expected a torch type"),
        (["plan", "pat_fast.models:resnet20", "--args", "{"], "--args: expected a JSON object"),
        (["plan", "pat_fast.models:resnet20", "--args", "[]"], "--args: expected a JSON object, got '[]'"),
        (["plan", "pat_fast.models:resnet20", "--input", "1,3,16,16"], "expected input[1, 3, 16, 16]"),
        (["plan", "pat_fast.models:resnet20", "--input", "1,99999999,99999999"], "expected a tensor that can be made"),
        (["plan", "sys:exit", "--args", "{}"], "expected sys:exit() to succeed, got SystemExit"),
        (["plan", "transformers:vitt"], "expected a model type of Transformers, got 'vitt'"),
        (["bench", "resnet51"], "did you mean 'resnet50'"),
        (["bench", "tiny", "--ops", "channel_reduce,compact"], "--ops: expected names out of"),
        (
            ["bench", "tiny", "--ops", "importance", "step"],
            "got step, for which there is --ops; an option takes one word",
        ),
        (["bench", "tiny", "--ops", "importance,", "step"], "without spaces between its values, as in --ops A,step"),
        (["bench", "--ops", "step", "cpu"], "got cpu, for which there is --backends"),
        (["bench", "tiny", "--deploy", "float32"], "got float32, for which there is --dtypes"),
        (["bench", "tiny", "--backends", "gpu"], "--backends: expected names out of"),
        (["bench", "tiny", "--dtypes", "float31"], "--dtypes: expected names out of"),
        (["bench", "tiny", "--device", "gpu"], "--device: expected cpu, cuda or cuda:0, got 'gpu'"),
        (["bench", "tiny", "--rounds", "0"], "--rounds: expected an integer >= 1"),
        (["bench", "tiny", "--rounds", "9", "--quick"], "--quick: expected no --rounds beside it, got 9"),
        (["bench", "tiny", "--json", "tiny.json/a.json"], "--json: expected a file that can be written"),
        (["bench", "tiny", "--deploy", "--ops", "step"], "--ops: expected none with --deploy"),
        (["bench", "tiny", "--input", "1,3,8,8"], "--input: expected PACKAGE.MODULE:FACTORY beside it"),
        (["bench", "tiny", "--runtimes", "eager"], "--runtimes: expected --deploy beside it"),
        (["bench", "tiny", "--macs", "0.4"], "--macs: expected --deploy beside it"),
        (["bench", "tiny", "--batch", "4"], "--batch: expected training in --ops beside it, or --deploy, got neither"),
        (["bench", "tiny", "--deploy", "--device", "bogus"], "--device: expected cpu with --deploy"),
        (["bench", ""], "MODEL: expected names, got ''"),
        (["bench", ","], "MODEL: expected names, got ','"),
        (["bench", "tiny", "--ops", ","], "--ops: expected names, got ','"),
        (["bench", "tiny", "--backends", ","], "--backends: expected names, got ','"),
        (["bench", "tiny", "--dtypes", ","], "--dtypes: expected names, got ','"),
        (["bench", "tiny", "--layouts", ","], "--layouts: expected names, got ','"),
        (["bench", "tiny", "--deploy", "--runtimes", ","], "--runtimes: expected names, got ','"),
        (["bench", "tiny", "--json", "x.png", "--plot", "./x.png"], "--plot: expected another file than --json"),
        (["bench", "tiny", "--plot", "plot.txt"], "--plot: expected a file name that ends in"),
        (["bench", "tiny", "--ops", "step"], "expected something to measure, got nothing"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(
    config: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], message: str
) -> None:
    monkeypatch.chdir(config.parent)
    result = invoke(*args)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert list(config.parent.iterdir()) == [config]


def test_debug_shows_the_error_itself(tmp_path: Path) -> None:
    result = invoke("train", tmp_path / "no.json", "--debug")
    assert type(result.exception).__name__ == "ConfigError"


def test_plan_shows_groups_members_and_what_is_frozen() -> None:
    result = invoke("plan", "pat_fast.models:resnet20", "--input", "1,1,16,16", "--args", '{"width": 8}')
    assert result.exit_code == 0, result.output
    for part in (
        "layer3.0.shortcut.0",
        "layer1.0.bn1: weight 0, bias 0",
        "frozen",
        "fc",
        "output of the model",
    ):
        assert part in result.stdout


STUBBORN = """import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 8, 1)
        self.third, self.fc = nn.Conv2d(8, 8, 1, groups=2), nn.Linear(512, 5)

    def forward(self, x):
        x = self.second(self.first(x))
        x = self.third(x)[:, torch.tensor([0, 3, 1, 2, 4, 5, 6, 7])]
        return self.fc(x.view(-1, 512))
"""


def shown_plan(name: str, code: str, sizes: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What `pat-fast plan` prints of the `Net` in a file, without the lines of its tables."""
    (folder / f"{name}.py").write_text(code)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "160")
    result = invoke("plan", f"{name}:Net", "--input", sizes)
    assert result.exit_code == 0, result.output
    return " ".join(result.stdout.replace("│", " ").split())


def test_plan_says_where_the_model_holds_channels_and_what_would_free_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = shown_plan("stubborn_net", STUBBORN, "2,3,8,8", tmp_path, monkeypatch)
    for part in (
        "second 8 in 4 units second: weight 0, bias 0 third: weight 1",
        "fc 5 is an output of the model (aten::addmm in fc) what reads the model's outputs expects this size",
        "third 8 is looked up by number (aten::index, stubborn_net.py:12) rows of a table",
    ):
        assert part in shown


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("one_shot", ["epoch  share", "    1  50.0%"]),
        ('{"schedule": "linear", "end_epoch": 2, "unit": "step"}', ["step  share", "   1  25.0%", "   2  50.0%"]),
        ("examples/prune_config.json", ["    5   0.0%", "   10  14.9%", "   50  50.0%"]),
    ],
)
def test_plan_shows_a_schedule(text: str, lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    result = invoke("plan", "pat_fast.models:resnet20", "--input", "1,1,16,16", "--schedule", text)
    assert result.exit_code == 0
    for line in lines:
        assert any(shown.startswith(line) for shown in result.stdout.splitlines())


TAGGER = """from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(6, 8, proj_size=5)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0])
"""


def test_plan_says_how_many_hidden_units_a_projection_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = shown_plan("tagger_net", TAGGER, "7,2,6", tmp_path, monkeypatch)
    assert "at least 6 units stay: hidden_size must stay above proj_size: PyTorch takes equal sizes" in shown


def test_plan_refuses_a_bad_schedule() -> None:
    result = invoke("plan", "pat_fast.models:resnet20", "--input", "1,1,16,16", "--schedule", "cubik")
    assert result.exit_code == 2
    assert "schedule: expected one of linear, cubic" in result.stderr


def test_plan_gives_a_network_of_transformers_what_it_reads() -> None:
    pytest.importorskip("transformers")
    text = {"n_layer": 1, "n_embd": 24, "n_head": 3, "vocab_size": 50}
    image = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 20}
    image |= {"image_size": 32, "patch_size": 8, "num_channels": 1}
    for kind, args, layers in (
        ("gpt2", text, ("h.0.mlp.c_fc", "h.0.attn.c_attn")),  # a cache among the outputs holds no heads
        ("vit", image, ("layers.0.mlp.fc1", "layers.0.attention.q_proj")),
    ):
        result = invoke("plan", f"transformers:{kind}", "--args", json.dumps(args))
        assert result.exit_code == 0, result.output
        free = result.stdout.partition("frozen")[0]
        assert all(layer in free for layer in layers), result.stdout


def test_a_network_larger_than_memory_is_refused_before_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    args = json.dumps({"n_layer": 1, "n_embd": 24, "n_head": 3, "vocab_size": 50})
    monkeypatch.setattr("pat_fast.factory._memory", lambda: 2.0**12)
    result = invoke("plan", "transformers:gpt2", "--args", args)
    assert result.exit_code == 2
    assert "transformers:gpt2: expected a network that fits into memory" in result.stderr
    monkeypatch.setattr("pat_fast.factory._memory", lambda: 2.0**30)
    assert invoke("plan", "transformers:gpt2", "--args", args).exit_code == 0


def test_plan_finds_a_network_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "from torch import nn\ndef net():\n    return nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))\n"
    (tmp_path / "my_network_file.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    result = invoke("plan", "my_network_file:net", "--input", "2,4")
    assert result.exit_code == 0, result.output
    assert "8 channels in 1 groups" in result.stdout


@pytest.mark.parametrize(("script", "expected"), [
    ("quickstart.py", "(50.0% of dense)"),
    ("torch_pruning_dropin.py", "step 4: MACs"),
])  # fmt: skip
def test_examples_run(script: str, expected: str) -> None:
    line = [sys.executable, str(ROOT / "examples" / script)]
    settings = environment() | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, capture_output=True, text=True, env=settings, check=False)
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout


@pytest.mark.usefixtures("_light_garbage")
def test_bench_prints_a_table_and_writes_what_it_found(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    files = "--json", tmp_path / "new" / "found.json", "--plot", tmp_path / "new" / "found.png"
    result = invoke("bench", "tiny", "--ops", "channel_reduce,channel_scale_", "--quick", *files)
    assert result.exit_code == 0, result.output
    assert "share of bandwidth" in result.stdout
    assert "3 rounds: a glance" in result.stdout
    found = json.loads((tmp_path / "new" / "found.json").read_text())
    assert {row["op"] for row in found["rows"]} == {"channel_reduce", "channel_reduce mul", "channel_scale_"}
    assert (tmp_path / "new" / "found.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.usefixtures("_light_garbage")
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_bench_says_in_one_line_that_a_disk_is_full(option: str, tmp_path: Path) -> None:
    """After the table: the measurements are not lost."""
    full = tmp_path / "full.png"
    full.symlink_to("/dev/full")
    if option == "--plot":
        pytest.importorskip("matplotlib")
    result = invoke("bench", "tiny", "--ops", "channel_scale_", "--quick", "--backends", "reference", option, full)
    assert result.exit_code == 2, result.output
    assert "share of bandwidth" in result.stdout
    assert f"error: {option}: expected a file that can be written, got [Errno 28]" in result.stderr.splitlines()[-1]


def test_bench_tries_matplotlib_before_it_measures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = subprocess.run(
        command("bench", "tiny", "--plot", tmp_path / "p.pdf"),
        capture_output=True,
        text=True,
        env=environment() | {"MPLBACKEND": "bogus"},
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: --plot: expected Matplotlib to draw, got ValueError: ")
    assert done.stderr.count("\n") == 1
    assert not any(tmp_path.iterdir())


@pytest.mark.usefixtures("_light_garbage")
def test_bench_ends_with_1_if_a_result_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    from pat_fast.backends import reference

    monkeypatch.setitem(reference.OPS, "channel_scale_", lambda xs, tiles, scale: None)
    result = invoke("bench", "tiny", "--ops", "channel_scale_", "--quick", "--backends", "cpu")
    assert result.exit_code == 1
    assert "no numbers: differs from the reference by up to" in result.stdout


def test_env_and_version() -> None:
    result = invoke("env")
    assert result.exit_code == 0, result.output
    assert "torch" in result.stdout
    assert invoke("--version").stdout.startswith("pat-fast ")
