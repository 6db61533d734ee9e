"""Prints the tables at the end of `pytest bench/`, and writes them when FASTTRAIN_BENCH_OUT names a results file."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest

from bench.common import ROWS, markdown, write_results
from bench.plots import write_plots


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--model", help="a folder or .gguf file: a trained model for what depends on one")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What PyTorch does by default is measured first: later tests leave holes in the heap that spare it page faults."""
    items.sort(key=lambda item: "default allocator" not in item.nodeid)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not ROWS:
        return
    terminalreporter.write_line(markdown(ROWS))
    title = os.environ.get("FASTTRAIN_BENCH_OUT")
    if title:
        path = write_results(ROWS, title)
        terminalreporter.write_line(f"\nwritten to {path}")
        if importlib.util.find_spec("matplotlib"):
            for plot in write_plots(ROWS, path.parent, title):
                terminalreporter.write_line(f"drawn in {plot}")
        else:
            terminalreporter.write_line("no plots: matplotlib is not installed (pip install 'fasttrain[plot]')")
