"""What is shown: a live line on a terminal, few plain lines in a file, honest numbers, a picture of the loss."""

from __future__ import annotations

import io
import json
import re
import struct
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import one_thread, tiny_trainer, token_loader  # noqa: F401

from fasttrain.progress import Progress, plot_losses, print_report, time_report, time_verdict


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def without_colours(text: str) -> str:
    return re.sub(r"\x1b\[[\d;]*m", "", text)


def shown(stream: Any, **options: Any) -> str:
    trainer = tiny_trainer(max_steps=6, log_every_steps=1, **options)
    trainer.progress = Progress(stream)
    trainer.train()
    return str(stream.getvalue())


def test_a_file_gets_plain_lines_at_intervals_and_always_the_last(tmp_path: Path) -> None:
    output = shown(io.StringIO(), val_dataloader=token_loader(1))
    assert "\r" not in output and "\x1b" not in output
    steps = re.findall(r"^step (\d)/6  loss", output, re.MULTILINE)
    assert steps == ["1", "6"]  # the six steps took far less than the second between two lines
    line = next(line for line in output.splitlines() if line.startswith("step 6/6"))
    for part in ("loss ", "lr ", "norm ", "tok/s", "data wait", "left"):
        assert part in line
    shape = r"^step 6  val loss \d\.\d+  perplexity [\d.]+  accuracy [\d.]+% \(best so far\)$"
    assert re.search(shape, output, re.MULTILINE)


def test_a_terminal_gets_one_panel_that_is_redrawn_and_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "90")
    monkeypatch.setattr("fasttrain.progress._REDRAW_SECONDS", 0.0)
    raw = shown(Terminal(), val_dataloader=token_loader(1))
    output = without_colours(raw)
    for part in ("step 6/6", "loss ", "lr ", "tok/s", "data wait ", "memory", " left", "of sgemm"):
        assert part in output
    assert output.count("step 6/6") >= 1 and output.count("╭─ fasttrain") >= 6
    assert "\x1b[1A\x1b[2K" in raw  # the cursor goes back up: no scrolling
    rest = output[output.rindex("╰"):]
    assert "val loss" in output and "completed at step 6" in rest


def test_a_fast_run_does_not_redraw_for_every_record() -> None:
    assert 1 <= without_colours(shown(Terminal())).count("╭─ fasttrain") <= 8  # each message draws it once more


def test_a_message_scrolls_by_above_the_panel() -> None:
    stream = Terminal()
    progress = Progress(stream)
    progress.screen.show(1, 6, {"loss": "3.0"}, "1 s")
    progress.log("saved [not markup]")
    text = without_colours(stream.getvalue())
    assert text.index("saved [not markup]") < text.rindex("╭─ fasttrain")
    progress.screen.close()


def test_a_notebook_gets_one_block_that_is_rewritten(monkeypatch: pytest.MonkeyPatch,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    blocks: list[str] = []

    class Handle:
        def update(self, block: str) -> None:
            blocks.append(block)

    class ZMQInteractiveShell:
        pass

    def display(block: str, display_id: bool) -> Handle:
        blocks.append("NEW " + block)
        return Handle()

    notebook = types.ModuleType("IPython")
    notebook.get_ipython = ZMQInteractiveShell  # type: ignore[attr-defined]
    notebook.display = types.ModuleType("IPython.display")  # type: ignore[attr-defined]
    notebook.display.HTML, notebook.display.display = str, display
    monkeypatch.setitem(sys.modules, "IPython", notebook)
    monkeypatch.setitem(sys.modules, "IPython.display", notebook.display)
    monkeypatch.setattr("fasttrain.progress._REDRAW_SECONDS", 0.0)
    tiny_trainer(max_steps=6, log_every_steps=1).train()
    assert [block.startswith("NEW ") for block in blocks].count(True) == 1 and len(blocks) >= 6
    assert "max='6'" in blocks[-1] and "tok/s" in blocks[-1]
    assert "completed at step 6" in capsys.readouterr().out


def test_other_ranks_show_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    tiny_trainer(max_steps=2).train()
    assert capsys.readouterr().out == ""


def test_the_mean_loss_is_smoothed_and_not_biased_to_its_start() -> None:
    progress = Progress(io.StringIO())
    texts = []
    progress._previous = record(0.0, seconds=0.0)
    for index, loss in enumerate((4.0, 4.0, 2.0), 1):
        texts.append(progress._describe(record(loss, seconds=float(index)))["loss"])
    assert texts[0] == "4.0000 (mean 4.0000)" and "(mean 4.0000)" in texts[1]
    weights = [0.9**2 * 0.1, 0.9 * 0.1, 0.1]
    assert f"(mean {(4 * weights[0] + 4 * weights[1] + 2 * weights[2]) / sum(weights):.4f})" in texts[2]


def record(loss: float, seconds: float, nonfinite: int = 0) -> dict[str, Any]:
    return {"loss": loss, "lr": 1e-3, "grad_norm": 0.5, "tokens": int(1000 * seconds), "seconds": seconds,
            "nonfinite_steps": nonfinite, "phase_seconds": {"data": 0.25 * seconds}}


def test_rates_are_those_of_the_interval_and_nan_is_shown_as_nan() -> None:
    progress = Progress(io.StringIO())
    progress._previous = record(1.0, seconds=2.0)
    figures = progress._describe({**record(float("nan"), seconds=4.0, nonfinite=3), "tokens": 12_000})
    assert (figures["speed"], figures["data wait"]) == ("5.00 K tok/s", "25%")
    assert (figures["loss"], figures["NON-FINITE"]) == ("nan", "3")


def test_non_finite_steps_are_announced(capsys: pytest.CaptureFixture[str]) -> None:
    def poisoned(model: Any, batch: Any) -> Any:
        return model(batch[0]).sum() * float("nan"), batch[1].ne(-1).sum()

    output = shown(io.StringIO(), loss_fn=poisoned)
    assert "step 1 is not finite (loss nan" in output and "its update was skipped, 1 so far" in output
    assert output.count("is not finite") == 3  # then the counter in the line is enough
    assert "NON-FINITE 6" in output


def test_the_time_report_adds_up_and_names_a_slow_loader() -> None:
    rows = time_report({"data": 4.0, "forward_backward": 5.0, "optimizer": 1.0})
    assert [name for name, _ in rows] == ["forward backward", "data", "optimizer", "verdict"]
    assert sum(float(re.findall(r"([\d.]+)%", value)[0]) for name, value in rows[:3]) == pytest.approx(100.0)
    assert "40% of the time went into waiting for data" in rows[3][1]
    for phases, words in (({"transfer": 2.0}, "pin_memory"), ({"save": 2.0}, "save_every_steps"), ({}, "nothing else"),
                          ({"log": 1.0}, "log_every_steps"), ({"eval": 9.0}, "eval_max_batches")):
        assert words in time_verdict({"forward_backward": 8.0, **phases})
    assert time_report({}) == []


def test_reports_are_tables_on_a_terminal_and_aligned_lines_elsewhere() -> None:
    plain, terminal = io.StringIO(), Terminal()
    for stream in (plain, terminal):
        print_report("title", [("a", "one [bracketed]"), ("longer", "two")], stream)
    assert plain.getvalue() == "title\n  a       one [bracketed]\n  longer  two\n"
    assert "one [bracketed]" in terminal.getvalue() and "\x1b[" in terminal.getvalue()


def test_the_plot_is_a_png_of_the_recorded_losses(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    metrics, png = tmp_path / "metrics.jsonl", tmp_path / "loss.png"
    records = [{"step": step, "kind": "train", "loss": 3.0 - step} for step in (1, 2)]
    records += [{"step": 2, "kind": "eval", "loss": 1.5}, {"step": 3, "kind": "train", "loss": "nan"},
                {"step": 3, "kind": "nonfinite", "loss": "nan"}, {"step": 3, "kind": "save"}]
    metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert plot_losses(metrics, png) == png
    data = png.read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    assert data.startswith(b"\x89PNG") and width > 600 and height > 300
    metrics.write_text('{"step": 3, "kind": "train", "loss": "nan"}\n')
    with pytest.raises(ValueError, match="no finite loss"):
        plot_losses(metrics, png)
