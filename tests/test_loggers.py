"""Every writer holds the run's figures, once a step, in the form that its own library reads back."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import Bigram, one_thread, tiny_trainer, token_loader  # noqa: F401

from fasttrain.callbacks import Callback
from fasttrain.loggers import CsvLogger, MlflowLogger, TensorBoardLogger, WandbLogger
from fasttrain.profiling import Norms, ProfilerTrace


class Truth(Callback):
    def __init__(self) -> None:
        self.losses: dict[int, float] = {}
        self.val: dict[int, float] = {}

    def on_log(self, state: Any, record: Any) -> None:
        self.losses[state.step] = record["loss"]

    def on_eval(self, state: Any, result: Any) -> None:
        self.val[state.step] = result.loss


def run(directory: Path, *callbacks: Any, steps: int = 6) -> Truth:
    truth = Truth()
    sets = {"short": token_loader(1), "long": token_loader(2)}
    tiny_trainer(directory, model=Bigram(), val_dataloader=sets, eval_every_steps=3, save_every_steps=3,
                 max_steps=steps, schedule="constant", callbacks=[truth, *callbacks]).train()
    return truth


def table(path: Path, name: str) -> dict[int, float]:
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    steps = [int(row["step"]) for row in rows if row["name"] == name]
    assert len(steps) == len(set(steps))
    return {int(row["step"]): float(row["value"]) for row in rows if row["name"] == name}


def test_csv_holds_each_figure_once_over_a_resume(tmp_path: Path) -> None:
    first = run(tmp_path, CsvLogger(), steps=4)
    second = run(tmp_path, CsvLogger(), steps=6)
    losses = table(tmp_path / "metrics.csv", "train/loss")
    assert losses == {**first.losses, **second.losses}
    assert table(tmp_path / "metrics.csv", "eval/loss") == {**first.val, **second.val}
    assert len(table(tmp_path / "metrics.csv", "eval/long/accuracy")) == 3


def test_tensorboard_reads_the_same_figures_back(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    truth = run(tmp_path, TensorBoardLogger())
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for name, wanted in (("train/loss", truth.losses), ("eval/loss", truth.val)):
        assert {event.step: event.value for event in events.Scalars(name)} == pytest.approx(wanted, rel=1e-6)
    assert "train/phase_seconds/data" in events.Tags()["scalars"]


def wandb_history(directory: Path, name: str) -> dict[int, float]:
    """What the offline run's file (protobuf records in LevelDB's log format) holds of one figure, by its step."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = directory.rglob("*.wandb")
    raw, at, part, found = path.read_bytes(), 7, b"", {}  # 7: the file's own header
    while at + 7 <= len(raw):
        rest_of_block = 32768 - at % 32768
        if rest_of_block < 7:
            at += rest_of_block
            continue
        length, kind = int.from_bytes(raw[at + 4 : at + 6], "little"), raw[at + 6]
        part += raw[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            history = Record.FromString(part).history
            for item in history.item:
                if name in (item.key, "/".join(item.nested_key)):
                    found[history.step.num] = json.loads(item.value_json)
            part = b""
    return found


def test_wandb_takes_the_figures_offline(tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb")
    logger = WandbLogger(project="test", mode="offline", settings={"silent": True})
    truth = run(tmp_path, logger)
    wandb.teardown()  # finish() does not wait until its helper process has written the file
    assert wandb_history(tmp_path, "train/loss") == pytest.approx(truth.losses)
    assert wandb_history(tmp_path, "eval/loss") == pytest.approx(truth.val)
    again = WandbLogger(project="test", mode="offline", settings={"silent": True})
    run(tmp_path, again, steps=8)
    assert again._id == logger._id


def test_mlflow_holds_parameters_and_metrics_of_one_run_over_a_resume(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # mlflow-skinny, which is enough here, has no database
    mlflow = pytest.importorskip("mlflow")
    uri = (tmp_path / "mlruns").as_uri()
    first = run(tmp_path, MlflowLogger(tracking_uri=uri, experiment="test"), steps=4)
    logger = MlflowLogger(tracking_uri=uri, experiment="test")
    second = run(tmp_path, logger, steps=6)
    client = mlflow.tracking.MlflowClient(uri)
    history = {metric.step: metric.value for metric in client.get_metric_history(logger._id, "train/loss")}
    assert history == pytest.approx({**first.losses, **second.losses})
    assert client.get_run(logger._id).data.params["lr"] == "0.01"


def test_a_missing_library_is_an_error_when_the_writer_is_made() -> None:
    code = ("import sys; sys.modules['wandb'] = None\nfrom fasttrain.loggers import WandbLogger\n"
            "try: WandbLogger()\nexcept ValueError as error: print(error)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'fasttrain[wandb]'" in done.stdout


def test_a_writer_that_fails_is_named_and_the_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Full(CsvLogger):
        def _append(self, step: int, values: Any) -> None:
            raise OSError("No space left on device")

    truth = run(tmp_path, Full())
    assert max(truth.losses) == 6
    assert "Full.on_log failed at step 2 (OSError: No space left on device); the run goes on" in capsys.readouterr().out


def test_norms_are_those_of_the_mean_gradient_by_part(tmp_path: Path) -> None:
    class Seen(Callback):
        norms: dict[str, float] = {}
        total = 0.0

        def on_event(self, state: Any, kind: str, details: Any) -> None:
            Seen.norms = dict(details)

        def on_log(self, state: Any, record: Any) -> None:
            Seen.total = record["grad_norm"]

    tiny_trainer(model=Bigram(), callbacks=[Norms(depth=1), Seen()], max_steps=2, grad_accum_steps=2).train()
    by_steps, Seen.norms = Seen.norms, {}
    tiny_trainer(model=Bigram(), callbacks=[Norms(depth=1), Seen()], max_steps=2, grad_accum_steps=2,
                 every_tokens={"log": 63}).train()  # 64 targets in two steps
    assert Seen.norms == by_steps
    assert set(Seen.norms) == {f"{kind}/{part}" for kind in ("weight", "gradient") for part in ("table", "head")}
    parts = [Seen.norms[f"gradient/{part}"] for part in ("table", "head")]
    assert sum(norm**2 for norm in parts) ** 0.5 == pytest.approx(Seen.total, rel=1e-4)


def test_a_profile_covers_the_steps_asked_for(tmp_path: Path) -> None:
    tiny_trainer(tmp_path, model=Bigram(), callbacks=[ProfilerTrace(2, 2)]).train()
    trace, text = tmp_path / "profile" / "steps-3-4.json", tmp_path / "profile" / "steps-3-4.txt"
    assert '"traceEvents"' in trace.read_text() and "aten::" in text.read_text()
