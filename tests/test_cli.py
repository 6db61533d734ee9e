"""The command line as a user types it, in processes of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SMALL = [
    "--tokenizer",
    "bytes",
    "--seq-len",
    "32",
    "--batch-size",
    "4",
    "--num-layers",
    "1",
    "--num-heads",
    "2",
    "--num-kv-heads",
    "1",
    "--hidden-size",
    "32",
    "--warmup-steps",
    "2",
    "--eval-every-steps",
    "0",
    "--val-fraction",
    "0.2",
]


def fasttrain(*arguments: str | Path, cwd: Path, ok: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "fasttrain", *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert not ok or done.returncode == 0, done.stdout + done.stderr
    return done


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text in it and a model trained on the text."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "text").mkdir()
    for number in range(12):
        (folder / "text" / f"{number}.txt").write_text(f"number {number} is a number. " * 40)
    fasttrain(
        "train", "--data", "text", "--out", "run", "--max-steps", "30", "--save-every-steps", "10", *SMALL, cwd=folder
    )
    return folder


def test_training_leaves_a_checkpoint_metrics_and_a_plot(workplace: Path) -> None:
    assert {"metrics.jsonl", "loss.png", "step-00000030"} <= {path.name for path in (workplace / "run").iterdir()}
    assert (workplace / "run/loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_command_with_more_steps_continues(workplace: Path) -> None:
    done = fasttrain("train", "--data", "text", "--out", "run", "--max-steps", "35", *SMALL, cwd=workplace)
    assert "step-00000030" in done.stdout and (workplace / "run/step-00000035").is_dir()


def test_eval_prints_the_same_result_for_any_batch_size(workplace: Path) -> None:
    results = []
    for size in ("1", "7"):
        done = fasttrain(
            "eval",
            "--checkpoint",
            "run",
            "--data",
            "text",
            "--val-fraction",
            "0.2",
            "--batch-size",
            size,
            cwd=workplace,
        )
        results.append(
            {
                name: float(value)
                for name, value in re.findall(r"(loss|bits_per_byte|num_targets) +([\d.]+)", done.stdout)
            }
        )
    assert results[0]["num_targets"] == results[1]["num_targets"] > 0
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], rel=1e-6) and 0 < results[0]["loss"] < 6


def test_generate_continues_the_prompt_and_is_repeatable(workplace: Path) -> None:
    command = ["generate", "--checkpoint", "run", "--prompt", "number 1 is", "--max-new-tokens", "20", "--seed", "3"]
    first, second = (fasttrain(*command, cwd=workplace).stdout for _ in range(2))
    assert first == second and first.startswith("number 1 is") and len(first) > len("number 1 is") + 5
    assert fasttrain(*command[:-1], "4", cwd=workplace).stdout != first
    several = fasttrain(*command, "--num-samples", "2", "--logit-bias", "101", "2.5", cwd=workplace)
    samples = several.stdout.split("\n---\n")
    assert len(set(samples)) == 2 and all(sample.startswith("number 1 is") for sample in samples)
    beams = fasttrain(*command, "--num-beams", "2", "--eos-token-id", "3", "4", "--stop", cwd=workplace)
    assert beams.stdout.startswith("number 1 is")


def test_verify_names_the_damaged_checkpoint(workplace: Path) -> None:
    assert fasttrain("verify", "run", cwd=workplace).stdout.count(": ok") >= 2
    victim = next((workplace / "run/step-00000030").glob("*.safetensors"))
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    done = fasttrain("verify", "run", cwd=workplace, ok=False)
    assert done.returncode == 1 and re.search(rf"step-00000030: .*{victim.name}", done.stdout)


def test_doctor_says_what_runs_here_and_why(workplace: Path) -> None:
    text = fasttrain("doctor", cwd=workplace).stdout
    for part in ("torch", "extension", "triton", "precision", "cpu memory policy", "cross_entropy on cpu"):
        assert part in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data", "nowhere.txt", "--out", "x", *SMALL], "nowhere.txt"),
        (["train", "--data", "text", "--out", "x", *SMALL, "--lr", "-1"], "lr is -1.0"),
        (["train", "--data", "text", "--out", "x", *SMALL, "--config-file", "missing.toml"], "missing.toml"),
        (["generate", "--checkpoint", "nowhere", "--prompt", "a"], "nowhere"),
        (["generate", "--checkpoint", "text", "--prompt", "a"], "holds no checkpoint"),
        (["generate", "--checkpoint", "run", "--prompt", "a", "--top-p", "2"], "top_p is 2.0"),
    ],
)
def test_bad_input_is_one_line_and_status_2(workplace: Path, arguments: list[str], message: str) -> None:
    done = fasttrain(*arguments, cwd=workplace, ok=False)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_a_config_file_gives_the_defaults_and_flags_override_it(workplace: Path) -> None:
    (workplace / "fast.toml").write_text("max_steps = 4\nlog_every_steps = 1\nlr = 0.01\n")
    fasttrain(
        "train",
        "--data",
        "text",
        "--out",
        "from-file",
        "--config-file",
        "fast.toml",
        *SMALL,
        "--max-steps",
        "3",
        cwd=workplace,
    )
    records = (workplace / "from-file/metrics.jsonl").read_text().splitlines()
    assert len([line for line in records if '"train"' in line]) == 3
    (workplace / "typo.toml").write_text("max_step = 4\n")
    done = fasttrain(
        "train", "--data", "text", "--out", "y", "--config-file", "typo.toml", *SMALL, cwd=workplace, ok=False
    )
    assert done.returncode == 2 and "did you mean 'max_steps'" in done.stderr


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_same_command_continues(workplace: Path, number: signal.Signals, status: int) -> None:
    command = [
        "train",
        "--data",
        "text",
        "--out",
        f"signal-{status}",
        "--max-steps",
        "100000",
        "--log-every-steps",
        "1",
        *SMALL,
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "fasttrain", *command],
        cwd=workplace,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    metrics = workplace / f"signal-{status}/metrics.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text().count("\n") > 3):
        time.sleep(0.05)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == status and "interrupted" in output
    step = int(next((workplace / f"signal-{status}").glob("step-*")).name.removeprefix("step-"))
    command[command.index("100000")] = str(step + 2)
    assert f"step-{step:08d}" in fasttrain(*command, cwd=workplace).stdout


def test_help_shows_a_default_of_a_newline_as_one_reads_it(tmp_path: Path) -> None:
    shown = " ".join(re.sub(r"[│╭╮╰╯─]", " ", fasttrain("generate", "--help", cwd=tmp_path).stdout).split())
    assert r"""sees no repeat. (default: '\n' : '"' '*')""" in shown
    given = ["--checkpoint", "x", "--prompt", "a", "--dry-breakers", "\n", ""]
    done = fasttrain("generate", *given, cwd=tmp_path, ok=False)
    assert "must not hold an empty string" in done.stderr  # they arrive as they were given
