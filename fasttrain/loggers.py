"""Writers for the figures of a run: CSV, TensorBoard, Weights & Biases, MLflow. `metrics.jsonl` comes by itself.

Each is an observer: what it raises is reported with its name, and the run goes on. The libraries are extras, imported
when a writer is made, so that a missing one is an error before the run and not a line in the middle of it.
"""

from __future__ import annotations

import csv
import importlib
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .callbacks import Callback, Run, figures_of
from .config import to_dict
from .state import TrainState


def scalars(record: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The plain numbers of a record, those of nested mappings as `outer/inner`."""
    flat: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            flat.update(scalars(value, f"{prefix}{key}/"))
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            flat[prefix + key] = value
    return flat


class ScalarWriter(Callback):
    """What the writers share: every record becomes named numbers at a step. `write` is what differs."""

    observer = True

    def write(self, step: int, values: Mapping[str, float]) -> None:
        raise NotImplementedError

    def on_log(self, state: TrainState, record: Mapping[str, Any]) -> None:
        self.write(state.step, scalars(record, "train/"))

    def on_eval(self, state: TrainState, result: Any) -> None:
        self.write(state.step, scalars(figures_of(result), "eval/"))


class CsvLogger(Callback):
    """One line a figure in `metrics.csv`: step, name, value. A table of fixed columns would lose figures that begin
    to exist in the middle of a run. A resume or a rewind drops the lines of the steps that will be trained again."""

    observer = True

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = None if path is None else Path(path)

    def on_train_start(self, state: TrainState, run: Run) -> None:
        if self.path is None:
            if run.directory is None:
                raise ValueError("CsvLogger has no place to write; pass CsvLogger(path) or checkpoint_dir= to the "
                                 "Trainer")
            self.path = run.directory / "metrics.csv"
        self._keep_until(-1 if run.resumed_step is None else run.resumed_step)

    def on_log(self, state: TrainState, record: Mapping[str, Any]) -> None:
        self._append(state.step, scalars(record, "train/"))

    def on_eval(self, state: TrainState, result: Any) -> None:
        self._append(state.step, scalars(figures_of(result), "eval/"))

    def on_event(self, state: TrainState, kind: str, details: Mapping[str, Any]) -> None:
        if kind == "rewind":
            self._keep_until(state.step)

    def _append(self, step: int, values: Mapping[str, float]) -> None:
        assert self.path is not None
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([step, name, repr(value)] for name, value in values.items())

    def _keep_until(self, step: int) -> None:
        assert self.path is not None
        rows: list[list[str]] = []
        if self.path.exists() and step >= 0:
            with open(self.path, newline="", encoding="utf-8") as file:
                rows = [row for row in csv.reader(file) if len(row) == 3 and row[0].isdigit() and int(row[0]) <= step]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["step", "name", "value"], *rows])
        os.replace(temporary, self.path)


class TensorBoardLogger(ScalarWriter):
    """Event files for TensorBoard (the extra `tensorboard`), and the configuration as text."""

    def __init__(self, directory: str | Path | None = None) -> None:
        self._make = _load("torch.utils.tensorboard", "tensorboard").SummaryWriter
        self.directory = None if directory is None else Path(directory)
        self._writer: Any = None

    def on_train_start(self, state: TrainState, run: Run) -> None:
        if self.directory is None and run.directory is None:
            raise ValueError("TensorBoardLogger has no place to write; pass TensorBoardLogger(directory) or "
                             "checkpoint_dir= to the Trainer")
        place = self.directory if self.directory is not None else run.directory / "tensorboard"  # type: ignore[operator]
        # TensorBoard itself hides what an earlier, longer run wrote after the step that this one continues.
        self._writer = self._make(str(place), purge_step=None if run.resumed_step is None else run.resumed_step + 1)
        self._writer.add_text("config", "\n".join(f"    {name} = {value!r}" for name, value in
                                                  to_dict(run.config).items()))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def on_train_end(self, state: TrainState, status: str) -> None:
        self._writer.close()

    def on_exception(self, state: TrainState, error: BaseException) -> None:
        if self._writer is not None:
            self._writer.close()


class WandbLogger(ScalarWriter):
    """A Weights & Biases run (the extra `wandb`). Options are `wandb.init`'s: project, name, mode="offline", ...

    The run's id is part of the checkpoint, so a resumed run continues the same page."""

    def __init__(self, **options: Any) -> None:
        self._wandb = _load("wandb", "wandb")
        self.options = options
        self._run: Any = None
        self._id: str | None = None

    def on_train_start(self, state: TrainState, run: Run) -> None:
        options = {"config": to_dict(run.config), **self.options}
        if self._id is not None:
            options = {"id": self._id, "resume": "allow", **options}
        if run.directory is not None:
            options.setdefault("dir", str(run.directory))
        self._run = self._wandb.init(**options)
        self._id = self._run.id

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def on_train_end(self, state: TrainState, status: str) -> None:
        self._run.summary["status"] = status
        self._run.finish()

    def on_exception(self, state: TrainState, error: BaseException) -> None:
        if self._run is not None:
            self._run.finish(exit_code=1)

    def state_dict(self) -> dict[str, Any]:
        return {"id": self._id}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._id = state["id"]


class MlflowLogger(ScalarWriter):
    """An MLflow run (the extra `mlflow`): parameters are the config's fields, metrics the figures.

    The run's id is part of the checkpoint, so a resumed run continues the same one."""

    def __init__(self, *, tracking_uri: str | None = None, experiment: str | None = None,
                 run_name: str | None = None) -> None:
        self._mlflow = _load("mlflow", "mlflow")
        self.tracking_uri, self.experiment, self.run_name = tracking_uri, experiment, run_name
        self._id: str | None = None

    def on_train_start(self, state: TrainState, run: Run) -> None:
        if self.tracking_uri is not None:
            self._mlflow.set_tracking_uri(self.tracking_uri)
        if self.experiment is not None:
            self._mlflow.set_experiment(self.experiment)
        fresh = self._id is None
        self._id = self._mlflow.start_run(run_id=self._id, run_name=self.run_name).info.run_id
        if fresh:  # parameters of an MLflow run cannot change
            self._mlflow.log_params(to_dict(run.config))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        # Its stores refuse infinities; NaN they keep.
        self._mlflow.log_metrics({name: value for name, value in values.items() if not math.isinf(value)}, step=step)

    def on_train_end(self, state: TrainState, status: str) -> None:
        self._mlflow.end_run("KILLED" if status == "interrupted" else "FINISHED")

    def on_exception(self, state: TrainState, error: BaseException) -> None:
        self._mlflow.end_run("FAILED")

    def state_dict(self) -> dict[str, Any]:
        return {"id": self._id}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._id = state["id"]


def _load(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"this writer needs {extra!r} ({error}): pip install 'fasttrain[{extra}]'") from error
