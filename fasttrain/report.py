"""One self-contained HTML page about one run or several: what happened, how fast, where the time went, what differed.

    fasttrain report runs/a runs/b

Everything comes from the files that a run leaves (`metrics.jsonl`, `samples.jsonl`, the newest checkpoint's manifest).
The plots are matplotlib's (the extra `plot`), written into the page as SVG; the page asks no network for anything.
"""

from __future__ import annotations

import html
import io
import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .callbacks import read_records
from .checkpointing import list_checkpoints, read_manifest
from .progress import time_verdict
from .utils import format_bytes, format_count, format_duration

_COLOURS = ("#2563eb", "#ea580c", "#059669", "#9333ea", "#dc2626", "#0891b2", "#ca8a04", "#db2777")
_PHASE_COLOURS = {"forward_backward": "#2563eb", "optimizer": "#7c3aed", "data": "#dc2626", "transfer": "#ea580c",
                  "eval": "#059669", "save": "#ca8a04", "log": "#64748b", "startup": "#94a3b8", "other": "#cbd5e1"}
_MANY = 200
"""Points from which a curve is drawn smoothed, over a faint line of the points themselves."""
_EVENTS = ("nonfinite", "resume", "rewind", "loss_spike", "out_of_memory", "control", "nonfinite_capsule", "end")


@dataclass
class RunFiles:
    """What one run left behind."""

    name: str
    records: list[dict[str, Any]]
    samples: list[dict[str, Any]] = field(default_factory=list)
    config: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def curve(self, kind: str, key: str) -> tuple[list[int], list[float]]:
        """(steps, finite values) of one figure."""
        points = [(record["step"], float(record[key])) for record in self.records
                  if record["kind"] == kind and _is_number(record.get(key))]
        points = [(step, value) for step, value in points if math.isfinite(value)]
        return [step for step, _ in points], [value for _, value in points]

    def throughput(self) -> tuple[list[int], list[float]]:
        """(steps, tokens a second in the interval that ends there); the clock starts anew with each session."""
        steps, rates, before = [], [], None
        for record in self.records:
            if record["kind"] == "resume":
                before = None
            if record["kind"] != "train":
                continue
            if before is not None and record["seconds"] > before["seconds"]:
                steps.append(record["step"])
                rates.append((record["tokens"] - before["tokens"]) / (record["seconds"] - before["seconds"]))
            before = record
        return steps, rates

    def seconds_by_phase(self) -> dict[str, float]:
        """Over all sessions of the run: the last record of each."""
        total: dict[str, float] = {}
        last: Mapping[str, Any] = {}
        for record in [*self.records, {"kind": "resume"}]:
            if record["kind"] == "train":
                last = record["phase_seconds"]
            elif record["kind"] == "resume":
                for phase, seconds in last.items():
                    total[phase] = total.get(phase, 0.0) + seconds
                last = {}
        return total


def write_report(directories: Sequence[str | Path], path: str | Path) -> Path:
    """Writes the page about the runs in `directories` to `path`.

    Raises:
        ValueError: no directory, one without metrics.jsonl, or matplotlib is missing.
    """
    if not directories:
        raise ValueError("a report needs at least one run's directory")
    runs = [_read_run(Path(directory)) for directory in directories]
    labels = _distinct([run.name for run in runs])
    for run, label in zip(runs, labels):
        run.name = label
    title = "fasttrain: " + ", ".join(run.name for run in runs)
    body = [_heading(runs), _summary(runs), _plots(runs), _ledger(runs), _events(runs), _samples(runs), _configs(runs)]
    Path(path).write_text(_PAGE.format(title=html.escape(title), body="\n".join(body)), encoding="utf-8")
    return Path(path)


def _read_run(directory: Path) -> RunFiles:
    metrics = directory / "metrics.jsonl"
    if not metrics.is_file():
        raise ValueError(f"{str(directory)!r} has no metrics.jsonl; pass the checkpoint_dir of a run")
    samples = directory / "samples.jsonl"
    checkpoints = list_checkpoints(directory)
    facts: Mapping[str, Any] = read_manifest(checkpoints[-1]).metadata if checkpoints else {}
    config = facts.get("config", {})
    return RunFiles(directory.resolve().name, read_records(metrics), read_records(samples) if samples.exists() else [],
                    config if isinstance(config, Mapping) else {}, facts)


def _distinct(names: list[str]) -> list[str]:
    return [name if names.count(name) == 1 else f"{name} ({index + 1})" for index, name in enumerate(names)]


def _heading(runs: Sequence[RunFiles]) -> str:
    dots = " ".join(f'<span class="dot" style="background:{colour}"></span>{html.escape(run.name)}'
                    for run, colour in zip(runs, _COLOURS * len(runs)))
    return f"<header><h1>Training report</h1><p class='runs'>{dots}</p></header>"


def _summary(runs: Sequence[RunFiles]) -> str:
    rows: dict[str, list[str]] = {}
    for run in runs:
        train = [record for record in run.records if record["kind"] == "train"]
        last = train[-1] if train else {}
        _, val = run.curve("eval", "loss")
        _, rates = run.throughput()
        phases = run.seconds_by_phase()
        ends = [record for record in run.records if record["kind"] == "end"]
        for name, text in (
            ("status", str(ends[-1].get("status", "")) if ends else "running, or killed"),
            ("steps", f"{last.get('step', 0):,}"),
            ("tokens", format_count(last.get("tokens", 0))),
            ("training loss", _number(last.get("loss"))),
            ("validation loss, best / last", f"{min(val):.4f} / {val[-1]:.4f}" if val else "none"),
            ("tokens a second, median", format_count(round(sorted(rates)[len(rates) // 2])) if rates else "none"),
            ("time", format_duration(sum(phases.values()))),
            ("peak memory", format_bytes(max((r.get("memory_bytes", 0) for r in train), default=0))),
            ("non-finite steps", str(last.get("nonfinite_steps", 0))),
            ("model", str(run.facts.get("model_class", "unknown"))),
            ("precision", str(run.facts.get("precision", "unknown")).removeprefix("torch.")),
        ):
            rows.setdefault(name, []).append(text)
    head = ["", *(run.name for run in runs)]
    return _section("Summary", _table(head, [[name, *texts] for name, texts in rows.items()]))


def _plots(runs: Sequence[RunFiles]) -> str:
    charts = [
        ("Loss", "nats per target", [("train", "loss", "-"), ("eval", "loss", "o--")], False),
        ("Learning rate", "", [("train", "lr", "-")], False),
        ("Gradient norm", "before clipping", [("train", "grad_norm", "-")], True),
        ("Throughput", "tokens a second", None, False),
    ]
    figures = "".join(f"<figure>{_chart(runs, *chart)}</figure>" for chart in charts)
    return _section("Curves", f'<div class="grid">{figures}</div>')


def _chart(runs: Sequence[RunFiles], title: str, label: str, curves: Any, logarithmic: bool) -> str:
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("a report needs matplotlib: pip install 'fasttrain[plot]'") from error
    with rc_context({"svg.hashsalt": title, "font.family": "sans-serif", "font.size": 10, "svg.fonttype": "none"}):
        figure = Figure(figsize=(6.2, 3.4), layout="constrained")
        axes = figure.subplots()
        for run, colour in zip(runs, _COLOURS * len(runs)):
            drawn = [run.throughput()] if curves is None else [run.curve(kind, key) for kind, key, _ in curves]
            styles = ["-"] if curves is None else [style for _, _, style in curves]
            names = [run.name] if curves is None else [run.name + (", validation" if kind == "eval" else "")
                                                       for kind, _, _ in curves]
            for (steps, values), style, name in zip(drawn, styles, names):
                if len(steps) >= _MANY and style == "-" and title != "Learning rate":
                    axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.25)
                    values = _smoothed(values)
                if steps:
                    axes.plot(steps, values, style, color=colour, linewidth=1.6, markersize=4, label=name)
            for record in run.records:
                if record["kind"] in ("nonfinite", "rewind"):
                    axes.axvline(record["step"], color="#dc2626", linewidth=0.7, alpha=0.4)
        axes.set(title=title, xlabel="optimizer step", ylabel=label)
        axes.title.set_fontweight("bold")
        norms = [norm for run in runs for norm in run.curve("train", "grad_norm")[1] if norm > 0]
        if logarithmic and norms and max(norms) > 10 * min(norms):  # less than a decade has no round numbers to show
            axes.set_yscale("log")
        if curves is None:
            axes.yaxis.set_major_formatter(lambda rate, _: format_count(round(rate)))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if len(axes.get_legend_handles_labels()[0]) > 1:
            axes.legend(frameon=False, fontsize=9)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg"):]
    prefix = re.sub(r"\W", "", title).lower()  # several SVGs in one page must not share ids
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    return svg


def _smoothed(values: Sequence[float]) -> list[float]:
    """Medians of each point and its neighbours, a hundredth of the points but at most 50: neither late nor led astray
    by a single spike."""
    reach = min(25, len(values) // 200)
    return [statistics.median(values[max(0, at - reach): at + reach + 1]) for at in range(len(values))]


def _ledger(runs: Sequence[RunFiles]) -> str:
    parts = []
    for run in runs:
        phases = run.seconds_by_phase()
        total = sum(phases.values())
        if not total:
            continue
        ordered = sorted(phases.items(), key=lambda item: -item[1])
        colours = {phase: _PHASE_COLOURS.get(phase, "#cbd5e1") for phase in phases}
        bar = "".join(f'<span style="width:{100 * seconds / total:.3f}%;background:{colours[phase]}" '
                      f'title="{html.escape(phase)} {seconds / total:.1%}"></span>' for phase, seconds in ordered)
        legend = "".join(f'<li><span class="dot" style="background:{colours[phase]}"></span>'
                         f"{phase.replace('_', ' ')} <b>{seconds / total:.1%}</b> {format_duration(seconds)}</li>"
                         for phase, seconds in ordered)
        parts.append(f"<h3>{html.escape(run.name)}</h3><div class='bar'>{bar}</div><ul class='legend'>{legend}</ul>"
                     f"<p class='verdict'>{html.escape(time_verdict(phases))}</p>{_ranks(run)}")
    return _section("Where the time went", "".join(parts) or "<p>No record yet.</p>")


def _ranks(run: RunFiles) -> str:
    """What the last record says of each rank, and whom the others waited for over all of them."""
    records = [record for record in run.records if record["kind"] == "train" and record.get("rank_numbers")]
    if not records:
        return ""
    last = records[-1]
    rows = [[f"{rank:,}", f"{rate:,.0f}", f"{share:.1%}"] for rank, rate, share in zip(
        last["rank_numbers"], last["rank_tokens_per_second"], last["rank_communication_share"])]
    slowest, times = Counter(record["slowest_rank"] for record in records).most_common(1)[0]
    behind = statistics.median(record["slowest_rank_behind"] for record in records if record["slowest_rank"] == slowest)
    return (_table(["rank", "tokens/s (last record)", "in communication"], rows)
            + f"<p class='verdict'>the others waited most for rank {slowest}: in {times} of {len(records)} records, "
              f"where it computed {behind:.0%} longer than the median rank</p>")


def _events(runs: Sequence[RunFiles]) -> str:
    rows = []
    for run in runs:
        for record in run.records:
            if record["kind"] in _EVENTS:
                details = {key: value for key, value in record.items() if key not in ("step", "kind") and value != ""}
                rows.append([run.name, f"{record['step']:,}", record["kind"].replace("_", " "),
                             ", ".join(f"{key} {value}" for key, value in details.items())])
    if len(rows) > 200:
        rows = [*rows[:100], ["", "", f"... {len(rows) - 200} more ...", ""], *rows[-100:]]
    return _section("Events", _table(["run", "step", "event", "details"], rows) if rows else "<p>None.</p>")


def _samples(runs: Sequence[RunFiles]) -> str:
    parts = []
    for run in runs:
        for sample in run.samples[-12:]:
            parts.append(f"<div class='sample'><small>{html.escape(run.name)}, step {sample['step']:,}</small>"
                         f"<pre><b>{html.escape(sample['prompt'])}</b>{html.escape(sample['text'])}</pre></div>")
    return _section("Samples", "".join(parts) or "<p>None were taken: add the callback SampleText.</p>")


def _configs(runs: Sequence[RunFiles]) -> str:
    names = list(dict.fromkeys(name for run in runs for name in run.config))
    if not names:
        return _section("Configuration", "<p>No checkpoint, so no configuration on record.</p>")
    rows = [[name, *(json.dumps(run.config.get(name)) for run in runs)] for name in names]
    different = [row for row in rows if len(set(row[1:])) > 1]
    head = ["field", *(run.name for run in runs)]
    parts = [_table(head, different)] if different else \
        ["<p>The same in all runs.</p>"] if len(runs) > 1 else []
    return _section("Configuration", "".join(parts) + f"<details><summary>All {len(rows)} fields</summary>"
                                                      f"{_table(head, rows)}</details>")


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = "".join(f"<th>{html.escape(text)}</th>" for text in head)
    lines = "".join("<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in row) + "</tr>" for row in rows)
    return f"<div class='wide'><table><thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table></div>"


def _number(value: Any) -> str:
    return f"{float(value):.4f}" if _is_number(value) else "none"


def _is_number(value: Any) -> bool:
    return (isinstance(value, (int, float)) and not isinstance(value, bool)) or value in ("nan", "inf", "-inf")


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><link rel="icon" href="data:,">
<style>
:root {{ color-scheme: light; --line: #e2e8f0; --soft: #64748b; }}
body {{ margin: 0; background: #f1f5f9; color: #0f172a; font: 15px/1.5 system-ui, "Segoe UI", Roboto, sans-serif; }}
header, section {{ max-width: 1080px; margin: 1.2rem auto; padding: 0 1rem; }}
section {{ background: white; border: 1px solid var(--line); border-radius: 12px; padding: 1rem 1.4rem 1.2rem; }}
h1 {{ margin: 1.4rem 0 0; font-size: 1.7rem; }}  h2 {{ margin: 0 0 .7rem; font-size: 1.1rem; }}
h3 {{ margin: .8rem 0 .3rem; font-size: .95rem; }}  .runs {{ color: var(--soft); margin: .2rem 0; }}
.dot {{ display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin: 0 .4em 0 .8em; }}
.dot:first-child {{ margin-left: 0; }}
.grid {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 1rem; }}
figure {{ margin: 0; }}  figure svg {{ width: 100%; height: auto; display: block; }}
table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }}
th {{ text-align: left; color: var(--soft); font-weight: 600; font-size: .85rem; }}
th, td {{ padding: .35rem .8rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }}
.wide {{ overflow-x: auto; }}  tr:last-child td {{ border-bottom: 0; }}
.bar {{ display: flex; height: 1.6rem; border-radius: 8px; overflow: hidden; background: var(--line); }}
.legend {{ list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; padding: 0; margin: .6rem 0;
  font-size: .9rem; }}
.legend .dot {{ margin-left: 0; }}  .verdict {{ margin: .2rem 0 0; color: var(--soft); }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; background: #f8fafc; border: 1px solid var(--line);
  border-radius: 8px; padding: .7rem .9rem; margin: .2rem 0 .8rem; }}
small, summary {{ color: var(--soft); }}  summary {{ cursor: pointer; margin: .6rem 0; }}
</style></head><body>
{body}
</body></html>
"""
