"""Where progress is drawn: a live panel on a terminal, an updating block in a notebook, plain lines anywhere else.

All three take the same figures (name -> text) and never touch the run.
"""

from __future__ import annotations

import html
import sys
from collections.abc import Mapping
from typing import Any, Protocol, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text


class Screen(Protocol):
    """A place for progress."""

    live: bool
    """Whether a new state replaces the old one, so that it can be drawn often."""

    def show(self, step: int, total: int | None, figures: Mapping[str, str], time: str) -> None: ...

    def log(self, message: str) -> None: ...

    def close(self) -> None: ...


def screen_for(stream: TextIO) -> Screen:
    """What suits the stream."""
    if stream.isatty():
        return TerminalScreen(stream)
    return NotebookScreen(stream) if stream is sys.stdout and in_notebook() else PlainScreen(stream)


def in_notebook() -> bool:
    """Whether a notebook's kernel runs this (a terminal's IPython is a terminal)."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return type(shell).__name__ == "ZMQInteractiveShell"


class PlainScreen:
    """One line a state, for files and CI."""

    live = False

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def show(self, step: int, total: int | None, figures: Mapping[str, str], time: str) -> None:
        parts = [text if name in ("speed", "use", "memory") else f"{name} {text}" for name, text in figures.items()]
        self.log("  ".join([_position(step, total), *parts, time]))

    def log(self, message: str) -> None:
        self.stream.write(message + "\n")
        self.stream.flush()

    def close(self) -> None:
        self.stream.flush()


class TerminalScreen:
    """One panel at the bottom; messages scroll by above it."""

    live = True

    def __init__(self, stream: TextIO) -> None:
        self.console = Console(file=stream, force_terminal=True)
        self._panel: Live | None = None

    def show(self, step: int, total: int | None, figures: Mapping[str, str], time: str) -> None:
        if self._panel is None:
            self._panel = Live(console=self.console, auto_refresh=False, transient=True, redirect_stdout=False,
                               redirect_stderr=False)
            self._panel.start()
        self._panel.update(panel(step, total, figures, time), refresh=True)

    def log(self, message: str) -> None:
        self.console.print(message, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self._panel is not None:
            self._panel.stop()
            self._panel = None


class NotebookScreen(PlainScreen):
    """One output block that is rewritten."""

    live = True

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._handle: Any = None

    def show(self, step: int, total: int | None, figures: Mapping[str, str], time: str) -> None:
        from IPython.display import HTML, display

        cells = "".join(f"<td style='padding:0 1em 0 0'><small>{html.escape(name)}</small><br>"
                        f"<b>{html.escape(text)}</b></td>" for name, text in figures.items())
        bar = f"<progress value='{step}' max='{total}' style='width:30em'></progress> " if total else ""
        block = HTML(f"<div>{bar}{html.escape(_position(step, total))}, {html.escape(time)}"
                     f"<table><tr>{cells}</tr></table></div>")
        if self._handle is None:
            self._handle = display(block, display_id=True)
        else:
            self._handle.update(block)

    def close(self) -> None:
        self._handle = None


def panel(step: int, total: int | None, figures: Mapping[str, str], time: str) -> Panel:
    """The panel of one state of a run."""
    head = Table.grid(padding=(0, 1), expand=True)
    head.add_column()
    head.add_column(ratio=1)
    head.add_column(justify="right")
    bar = ProgressBar(total=total, completed=step) if total else Text("")
    head.add_row(Text(_position(step, total), style="bold"), bar, Text(time, style="dim"))
    grid = Table.grid(padding=(0, 3, 0, 0))
    names = list(figures)
    for _ in range(4):
        grid.add_column()
    for start in range(0, len(names), 4):
        grid.add_row(*(Text.assemble((f"{name} ", "red bold" if name == "NON-FINITE" else "dim"), figures[name])
                       for name in names[start:start + 4]))
    return Panel(Group(head, grid), title="fasttrain", title_align="left", border_style="dim")


def _position(step: int, total: int | None) -> str:
    return f"step {step:,}/{total:,}" if total else f"step {step:,}"
