"""One HTML page tells what runs did; it needs no network and a browser finds nothing to complain about."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import Bigram, one_thread, tiny_trainer, token_loader  # noqa: F401

from fasttrain.callbacks import SampleText
from fasttrain.cli import main
from fasttrain.report import RunFiles, write_report

pytest.importorskip("matplotlib")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Letters:
    def encode(self, text: str) -> list[int]:
        return [ord(letter) % 29 for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(97 + i % 26) for i in ids) + "<b>&"


def run(directory: Path, **options: Any) -> Path:
    for steps in (6, 12):  # with a resume in the middle
        trainer = tiny_trainer(directory, model=Bigram(), val_dataloader=token_loader(1), eval_every_steps=3,
                               log_every_steps=1, max_steps=steps, callbacks=[SampleText("once <i>", max_new_tokens=4)],
                               **options)
        trainer.tokenizer = Letters()
        trainer.train()
    return directory


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    runs = [run(root / "low", lr=1e-3), run(root / "high", lr=1e-1)]
    with pytest.raises(SystemExit) as end:
        main(["report", *map(str, runs), "--out", str(root / "report.html")])
    assert end.value.code == 0
    return root / "report.html"


def test_the_page_holds_curves_ledger_samples_events_and_the_difference(page: Path) -> None:
    text = page.read_text()
    assert text.count("<svg") == 4
    for part in ("Where the time went", "forward backward", "of the time went into", "resume", "completed",
                 "low, validation", "once &lt;i&gt;", "&lt;b&gt;&amp;", "0.001", "0.1", "Throughput"):
        assert part in text, part
    rows = re.findall(r"<tr><td>([a-z_]+)</td><td>[^<]*</td><td>[^<]*</td></tr>", text.split("All ")[0])
    assert rows[-1:] == ["lr"]  # the one field that differs


def test_the_page_needs_no_network_and_is_well_formed(page: Path) -> None:
    text = page.read_text()
    links = [link for link in re.findall(r"(?:src|href)=[\"']([^\"']*)", text) if not link.startswith(("#", "data:"))]
    assert links == [] and "<script" not in text and "@import" not in text
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert all(target in ids for target in re.findall(r'xlink:href="#([^"]+)"', text))
    parser = HTMLParser()
    parser.feed(text)
    parser.close()


def test_throughput_and_ledger_are_counted_per_session() -> None:
    def train(step: int, tokens: int, seconds: float, data: float) -> dict[str, Any]:
        return {"kind": "train", "step": step, "tokens": tokens, "seconds": seconds, "phase_seconds": {"data": data}}

    files = RunFiles("x", [train(1, 100, 1.0, 0.5), train(2, 300, 2.0, 0.7), {"kind": "resume", "step": 2},
                           train(3, 400, 1.0, 0.1), train(4, 450, 2.0, 0.2)])
    assert files.throughput() == ([2, 4], [200.0, 50.0])
    assert files.seconds_by_phase() == pytest.approx({"data": 0.9})


def test_a_directory_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no metrics\.jsonl"):
        write_report([tmp_path], tmp_path / "x.html")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (.ci/run installs Debian's)")
def test_a_browser_shows_the_page_without_a_complaint(page: Path) -> None:
    picture = page.with_suffix(".png")
    done = subprocess.run(
        [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0",
         "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--hide-scrollbars", "--window-size=1200,2400", f"--user-data-dir={page.parent / 'profile'}",
         f"--screenshot={picture}", page.as_uri()], capture_output=True, text=True, timeout=120)
    assert picture.exists(), done.stderr
    assert not [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    width, height = struct.unpack(">II", picture.read_bytes()[16:24])
    assert (width, height) == (1200, 2400) and picture.stat().st_size > 50_000
