"""What a person sees of a run: a startup report, a live panel on a terminal or timed plain lines elsewhere, a summary.

Everything shown comes from the loop's records; nothing here touches the device. The files are `JsonlLogger`'s; this
module only draws them (`plot_losses`). Deliberately left out: dashboards, and anything that needs a network.
"""

from __future__ import annotations

import io
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table

from .callbacks import Callback, Run, read_records
from .screens import Screen, screen_for
from .state import TrainState
from .utils import format_bytes, format_count, format_duration

_SMOOTHING = 0.9
_REDRAW_SECONDS = 0.25
_BEHIND = 0.1  # a rank that computes this share longer than the median one is named


class Progress(Callback):
    """Shows a run: one live panel on a terminal, one updating block in a notebook, and elsewhere (files, CI) at most
    one plain line every `plain_every_seconds`, so that a log file stays readable. Other ranks than 0 show nothing."""

    observer = True

    def __init__(self, stream: TextIO | None = None, *, plain_every_seconds: float = 1.0) -> None:
        rank = int(os.environ.get("RANK", "0"))  # torchrun's
        self.stream = stream if stream is not None else sys.stdout if rank == 0 else io.StringIO()
        self.screen: Screen = screen_for(self.stream)
        self.plain_every_seconds = plain_every_seconds
        self._run: Run | None = None
        self._pace_step = 0
        self._started = self._pace_start = self._last_shown = 0.0
        self._smooth = self._weight = 0.0
        self._previous: Mapping[str, Any] = {}
        self._records = 0
        self._figures: dict[str, str] = {}

    def log(self, message: str) -> None:
        """Prints one line without breaking the live display."""
        self.screen.log(message)

    def on_train_start(self, state: TrainState, run: Run) -> None:
        self._run, self._pace_step = run, state.step
        self._started = self._pace_start = time.monotonic()
        self._last_shown, self._records = -math.inf, 0
        self._previous = {"tokens": state.counters.tokens_seen, "seconds": 0.0, "phase_seconds": {},
                          "communication_seconds": state.team.seconds}

    def on_step(self, state: TrainState) -> None:
        if self.screen.live and time.monotonic() - self._last_shown >= _REDRAW_SECONDS:
            self._draw(state)

    def on_log(self, state: TrainState, record: Mapping[str, Any]) -> None:
        self._figures = self._describe(record)
        self._previous = record
        last = self._run is not None and state.step == self._run.max_steps
        pause = _REDRAW_SECONDS if self.screen.live else self.plain_every_seconds
        if last or time.monotonic() - self._last_shown >= pause:
            self._draw(state)
        if self._records == 0:
            self._pace_step, self._pace_start = state.step, time.monotonic()
        self._records += 1

    def on_eval(self, state: TrainState, result: Any) -> None:
        parts = [f"step {state.step}", f"val loss {result.loss:.4f}", f"perplexity {result.perplexity:.4g}"]
        if result.bits_per_byte is not None:
            parts.append(f"{result.bits_per_byte:.4f} bits/byte")
        if result.accuracy is not None:
            parts.append(f"accuracy {result.accuracy:.1%}")
        best = " (best so far)" if state.counters.best_step == state.step else ""
        self.log("  ".join(parts) + best)
        for name, part in result.sets.items():
            self.log(f"  {name}: loss {part.loss:.4f}  perplexity {part.perplexity:.4g}  {part.num_targets:,} targets")

    def on_nonfinite(self, state: TrainState) -> None:
        counters = state.counters
        if counters.nonfinite_in_a_row <= 3 or counters.nonfinite_steps % 100 == 0:
            self.log(f"warning: step {state.step} is not finite (loss {counters.last_loss:.4g}, gradient norm "
                     f"{counters.last_grad_norm:.4g}); its update was skipped, {counters.nonfinite_steps} so far")

    def on_event(self, state: TrainState, kind: str, details: Mapping[str, Any]) -> None:
        if kind == "out_of_memory":
            self.log(f"warning: out of memory in step {state.step + 1}: micro-batches are now divided into "
                     f"{details['pieces']} pieces of {details['sequences']} sequences, for the rest of the run; the "
                     "step is done again and computes the same")
        elif kind == "rewind":
            self.log(f"rewound from step {details['from_step']} to {details['checkpoint']}; batches passed over "
                     f"(epoch, after, up to): {details['passed_over']}")

    def on_save(self, state: TrainState, path: Path) -> None:
        self.log(f"saved {path}")

    def on_train_end(self, state: TrainState, status: str) -> None:
        self.screen.close()

    def on_exception(self, state: TrainState, error: BaseException) -> None:
        self.screen.close()

    def _describe(self, record: Mapping[str, Any]) -> dict[str, str]:
        before = self._previous
        seconds = max(record["seconds"] - before["seconds"], 1e-9)
        if math.isfinite(record["loss"]):
            # Debiased: the first value is the first loss, not a tenth of it.
            self._smooth = _SMOOTHING * self._smooth + (1 - _SMOOTHING) * record["loss"]
            self._weight = _SMOOTHING * self._weight + (1 - _SMOOTHING)
        smooth = f" (mean {self._smooth / self._weight:.4f})" if self._weight else ""
        waited = record["phase_seconds"].get("data", 0.0) - before["phase_seconds"].get("data", 0.0)
        rate = (record["tokens"] - before["tokens"]) / seconds
        figures = {"loss": f"{record['loss']:.4f}{smooth}", "lr": f"{record['lr']:.2e}",
                   "norm": f"{record['grad_norm']:.3f}", "speed": f"{format_count(round(rate))} tok/s",
                   "data wait": f"{waited / seconds:.0%}"}
        ranks = record.get("ranks", 1)
        if ranks > 1:
            told = record["communication_seconds"] - before["communication_seconds"]
            figures["each rank"] = f"{format_count(round(rate / ranks))} tok/s"
            figures["communication"] = f"{told / seconds:.0%}"
            if record.get("slowest_rank_behind", 0.0) >= _BEHIND:
                figures["waiting for"] = f"rank {record['slowest_rank']} (+{record['slowest_rank_behind']:.0%})"
        flops, peak = (self._run.flops_per_token, self._run.peak_flops) if self._run is not None else (None, None)
        if flops and peak:
            figures["use"] = f"{rate * flops / peak[0] / ranks:.0%} {peak[1]}"
        if record.get("memory_bytes"):
            figures["memory"] = format_bytes(record["memory_bytes"])
        if record["nonfinite_steps"]:
            figures["NON-FINITE"] = f"{record['nonfinite_steps']}"
        return figures

    def _draw(self, state: TrainState) -> None:
        self._last_shown = time.monotonic()
        total = self._run.max_steps if self._run is not None else None
        self.screen.show(state.step, total, self._figures, self._time_left(state, total))

    def _time_left(self, state: TrainState, total: int | None) -> str:
        """Elapsed time, and the rest at the pace since the first record (what compiles or warms up comes before it),
        evaluations and saves included."""
        now = time.monotonic()
        elapsed, since, done = now - self._started, self._pace_start, state.step - self._pace_step
        if not total or done <= 0:
            return format_duration(elapsed)
        return f"{format_duration(elapsed)}, {format_duration((now - since) / done * (total - state.step))} left"


def print_report(title: str, rows: Sequence[tuple[str, str]], stream: TextIO | None = None) -> None:
    """Name and value pairs: a table on a terminal, aligned plain lines elsewhere."""
    stream = stream if stream is not None else sys.stdout
    if stream.isatty():
        table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None,
                      padding=(0, 2, 0, 0))
        for name, value in rows:
            table.add_row(f"[dim]{name}[/dim]", value.replace("[", r"\["))
        Console(file=stream).print(table)
        return
    width = max((len(name) for name, _ in rows), default=0)
    stream.write("\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in rows)]) + "\n")
    stream.flush()


def time_report(seconds_by_phase: Mapping[str, float]) -> list[tuple[str, str]]:
    """Rows of phase, time and share (they add up to the wall-clock), and one plain verdict."""
    total = sum(seconds_by_phase.values())
    if total <= 0:
        return []
    ordered = sorted(seconds_by_phase.items(), key=lambda item: -item[1])
    rows = [(phase.replace("_", " "), f"{format_duration(seconds)}  {seconds / total:.1%}")
            for phase, seconds in ordered]
    return [*rows, ("verdict", time_verdict(seconds_by_phase))]


_REMEDIES = {
    "data": (0.1, "waiting for data: give the loader workers or prefetching"),
    "transfer": (0.1, "moving batches to the device: use pin_memory=True in the loader"),
    "save": (0.1, "saving: raise save_every_steps"),
    "log": (0.05, "logging: raise log_every_steps, or use fewer writers"),
    "eval": (0.4, "evaluation: raise eval_every_steps, or set eval_max_batches"),
    "communication": (0.3, "summing gradients over ranks: raise grad_accum_steps or the batch"),
    "startup": (0.5, "starting up: a longer run would make that small"),
}


def time_verdict(seconds_by_phase: Mapping[str, float]) -> str:
    """One sentence: the first thing worth changing, or that there is none."""
    total = max(sum(seconds_by_phase.values()), 1e-9)
    shares = {phase: seconds_by_phase.get(phase, 0.0) / total for phase in _REMEDIES}
    worst = max(_REMEDIES, key=lambda phase: shares[phase] / _REMEDIES[phase][0])
    if shares[worst] > _REMEDIES[worst][0]:
        return f"{shares[worst]:.0%} of the time went into {_REMEDIES[worst][1]}"
    computing = sum(seconds_by_phase.get(phase, 0.0) for phase in ("forward_backward", "optimizer", "eval"))
    return f"{computing / total:.0%} of the time went into computing; nothing else is worth changing first"


def plot_losses(metrics_jsonl: str | Path, png: str | Path) -> Path:
    """Draws training and validation loss over steps from a `metrics.jsonl` into a PNG.

    Raises:
        ValueError: the file holds no loss, or matplotlib (the extra `plot`) is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("plot_losses needs matplotlib: pip install 'fasttrain[plot]'") from error
    records = read_records(metrics_jsonl)
    curves = {kind: [(record["step"], float(record["loss"])) for record in records
                     if record["kind"] == kind and math.isfinite(float(record["loss"]))] for kind in ("train", "eval")}
    if not any(curves.values()):
        raise ValueError(f"{str(metrics_jsonl)!r} holds no finite loss to plot; train for log_every_steps first")
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for kind, label, style in (("train", "training", "-"), ("eval", "validation", "o-")):
        if curves[kind]:
            axes.plot(*zip(*curves[kind]), style, label=label, linewidth=1.2, markersize=3)
    skipped = [r["step"] for r in records if r["kind"] == "nonfinite"]
    for index, step in enumerate(skipped):
        axes.axvline(step, color="red", linewidth=0.6, alpha=0.5, label=None if index else "non-finite step")
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(png, dpi=130)
    return Path(png)
