"""`make torture`: the campaign as jobs, several at a time, and its report, written anew after each of them.

A job runs in a session of its own, so that a signal meant for one reaches no other, and what a job forks lives in a
process group of its own. A job that is told to stop ends as "aborted" and none of its counts are used; one that breaks
ends as "failed"; neither is ever "wrong". Finished jobs are kept under build/torture/ by code, seed and scale: an
interrupted campaign goes on where it was.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(ROOT)]

import campaign  # noqa: E402
import mutants  # noqa: E402
import peers  # noqa: E402
import torch  # noqa: E402
from campaign import Part  # noqa: E402

ABORTED = 75  # exit code of a job that was told to stop
GRACE_SECONDS = 10.0  # for such a job to remove its files


class Aborted(BaseException):
    """This process was told to stop: nothing that it saw since then counts."""


@dataclass(frozen=True)
class Job:
    """`work(scale, seed)` gives rows of the table, or lines of text for the end of the report."""

    name: str
    work: Callable[[float, int], list[Part] | list[str]]


@dataclass
class Ended:
    """What became of a job; `how` is "" if it ran to its end."""

    name: str
    seconds: float
    how: str = ""
    commit: str = ""
    parts: list[Part] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


def scaled(count: int, scale: float) -> int:
    return max(1, round(count * scale))


def _mutant(mutant: mutants.Mutant) -> Job:
    def work(scale: float, seed: int) -> list[Part]:
        alive = [] if mutants.killed(mutant) else [mutant.name]
        return [Part("mutants of the safety code caught by the tests", 1, alive, mutant.name)]

    return Job(f"mutant: {mutant.name}", work)


def _unmutated(scale: float, seed: int) -> list[str]:
    """Without this every mutant might seem to be caught: what is not changed must pass."""
    line = mutants.MUTANTS[0].old
    if mutants.killed(mutants.Mutant("none", mutants.MUTANTS[0].file, line, line)):
        raise RuntimeError("the tests that catch mutants fail on the package as it is")
    return []


def _weather(kinds: str) -> Job:
    def work(scale: float, seed: int) -> list[Part]:
        with tempfile.TemporaryDirectory() as folder:
            return campaign.weather(Path(folder), 1, scaled(2000, scale), seed, kinds)

    return Job(f"weather: {kinds}", work)


def _resume(kind: str) -> Job:
    return Job(f"resume: {kind}", lambda scale, seed: [campaign.exact_resume(scaled(12, scale), seed, (kind,))])


def _random_kills(shard: int, of: int) -> Job:
    return Job(f"killed runs {shard + 1} of {of}",
               lambda scale, seed: [campaign.killed_runs(scaled(1200 // of, scale), seed * 1000 + shard)])


def _signals(shard: int, of: int) -> Job:
    return Job(f"signals {shard + 1} of {of}",
               lambda scale, seed: [campaign.signals(scaled(1000 // of, scale), seed * 1000 + shard)])


JOBS: list[Job] = [  # the longest first, so that the last ones to end are short
    *(_resume(kind) for kind in campaign.LOADERS),
    *(_signals(shard, 8) for shard in range(8)),
    *(_weather(kinds) for kinds in ("the call", "once", "from then on", "random")),
    Job("power cuts", lambda scale, seed: [campaign.power_cuts(10**9)]),
    *(_random_kills(shard, 4) for shard in range(4)),
    Job("peers", lambda scale, seed: peers.table(scaled(1000, max(scale, 0.1)), seed, with_trainers=True)),
    Job("no mutant", _unmutated),
    *(_mutant(mutant) for mutant in mutants.MUTANTS),
    Job("concurrent", lambda scale, seed: [campaign.concurrent(60.0 * scale)]),
    Job("hostile", lambda scale, seed: campaign.hostile(60.0 * scale, seed)),
    Job("hostile memory", lambda scale, seed: [campaign.hostile_memory(1)]),
]


def merged(ended: Iterable[Ended]) -> list[Part]:
    """One row for all parts of one name: counts are added, notes joined where they differ."""
    rows: dict[str, Part] = {}
    notes: dict[str, dict[str, None]] = {}  # in order, each once
    for part in (part for job in ended for part in job.parts):
        row = rows.setdefault(part.name, Part(part.name, 0))
        row.trials += part.trials
        row.wrong = [*row.wrong, *part.wrong]
        row.seconds = [*row.seconds, *part.seconds]
        row.counts = {key: row.counts.get(key, 0) + part.counts.get(key, 0) for key in {**row.counts, **part.counts}}
        told = notes.setdefault(part.name, {})
        if part.note:
            told[part.note] = None
        row.note = "; ".join(told)
    return list(rows.values())


def report(ended: list[Ended], scale: float, seed: int, status: str, wall: float, at_once: int) -> str:
    """The markdown page. `status` is "" for a whole campaign."""
    order = {job.name: index for index, job in enumerate(JOBS)}
    good = sorted((job for job in ended if not job.how), key=lambda job: order.get(job.name, 0))
    missing = [job.name for job in JOBS if job.name not in {job.name for job in good}]
    work = sum(job.seconds for job in good) / 60
    commits = ", ".join(dict.fromkeys(job.commit for job in good)) or commit()
    lines = [
        "# Reliability of checkpoints",
        "",
        f"Made by `make torture` (scale {scale:g}, seed {seed}) at {commits}: {len(good)} of {len(JOBS)} jobs ran to "
        f"their end. Together they took {work:.1f} min of one core each, so {work / 2:.1f} min two at a time (here "
        f"{at_once} at a time, {wall / 60:.1f} min). torch {torch.__version__}, Python {platform.python_version()}, "
        f"Linux {platform.release().split('-')[0]}, files on tmpfs. A bound is 3/N: with none wrong in N trials, the "
        "true share is below it (95 % confidence). Real power cuts, network file systems, GPUs: not tried.",
        "",
    ]
    if status or missing:
        lines += [f"**{status or 'Not whole'}**; without a result: {', '.join(missing) or 'none'}.", ""]
    lines += [f"{job.name}: {job.how}" for job in ended if job.how.startswith("failed")]
    lines += ["| what | trials | wrong | bound | |", "|---|---|---|---|---|", *(row.line() for row in merged(good)), ""]
    wrong = [f"- WRONG: {row.name}: {text}" for row in merged(good) for text in row.wrong]
    text = [line for job in good for line in job.lines]
    if text:
        text = ["## One flipped bit, or one cut, and what loading makes of it", "", *text, ""]
    times = ", ".join(f"{job.name} {job.seconds:.0f} s" for job in sorted(good, key=lambda job: -job.seconds))
    return "\n".join([*lines, *wrong, *text, f"Time by job: {times}.", ""])


def run_job(name: str, scale: float, seed: int, target: Path) -> int:
    """In the job's own process: exit code 0 and a result in `target`, or ABORTED and none."""
    def told(number: int, frame: object) -> None:
        raise Aborted(signal.Signals(number).name)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, told)
    job = next(job for job in JOBS if job.name == name)
    torch.set_num_threads(1)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():  # the runs' own reports go nowhere
            warnings.simplefilter("ignore")
            result = job.work(scale, seed)
    except Aborted:
        return ABORTED
    parts = [asdict(item) for item in result if isinstance(item, Part)]
    lines = [item for item in result if isinstance(item, str)]
    partial = target.with_suffix(".partial")
    partial.write_text(json.dumps({"parts": parts, "lines": lines}))
    os.replace(partial, target)
    return 0


class Runner:
    """Starts jobs, collects what they leave, and ends those that run when it is told to stop itself."""

    def __init__(self, folder: Path, scale: float, seed: int, at_once: int, out: Path | None) -> None:
        self.folder, self.scale, self.seed, self.at_once, self.out = folder, scale, seed, at_once, out
        self.ended: list[Ended] = []
        self.running: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
        self.told = 0
        self.start = time.monotonic()

    def run(self, names: list[str], only: str) -> int:
        """The jobs `names` that match `only`, and what is kept of all; 0 none wrong, 1 some wrong or failed, 128 + n
        stopped by signal n."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._told)
        waiting = []
        for name in names:  # what an earlier campaign has finished
            kept = self._read(name)
            if kept is not None:
                self._end(kept, "(kept)")
            elif re.search(only, name):
                waiting.append(name)
        while (waiting or self.running) and not self.told:
            while waiting and len(self.running) < self.at_once:
                self._start(waiting.pop(0))
            for name in [name for name, (process, _) in self.running.items() if process.poll() is not None]:
                self._collect(name)
            time.sleep(0.05)
        for process, _ in self.running.values():
            process.terminate()  # the job only: its children are no part of what was asked
        for name in list(self.running):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.running[name][0].wait(GRACE_SECONDS)
            self._collect(name, f"aborted by {signal.Signals(self.told).name}")
        self._write()
        if self.told:
            return 128 + self.told
        return int(any(job.how or any(part.wrong for part in job.parts) for job in self.ended))

    def _told(self, number: int, frame: object) -> None:
        self.told = number

    def _path(self, name: str, kind: str) -> Path:
        return self.folder / f"{re.sub('[^a-z0-9]+', '-', name.lower())}.{kind}"

    def _start(self, name: str) -> None:
        command = [sys.executable, __file__, "--job", name, "--scale", str(self.scale), "--seed", str(self.seed),
                   "--result", str(self._path(name, "json"))]
        with open(self._path(name, "log"), "wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        self.running[name] = (process, time.monotonic())

    def _read(self, name: str) -> Ended | None:
        with contextlib.suppress(OSError):
            data = json.loads(self._path(name, "json").read_text())
            return Ended(name, data.get("seconds", 0.0), "", data.get("commit", ""),
                         [Part(**part) for part in data["parts"]], data["lines"])
        return None

    def _collect(self, name: str, how: str = "") -> None:
        process, start = self.running.pop(name)
        seconds = time.monotonic() - start
        end_session(process.pid)
        code = process.wait()
        ended = self._read(name) if code == 0 else None
        if ended is None:
            tail = self._path(name, "log").read_text(errors="replace").strip().splitlines()[-1:]
            how = how or (f"aborted (exit {code})" if code in (ABORTED, -signal.SIGTERM, -signal.SIGKILL)
                          else f"failed with exit {code}: {' '.join(tail)[:300]}")
            self._end(Ended(name, seconds, how))
            return
        data = json.loads(self._path(name, "json").read_text())
        ended.seconds, ended.commit = seconds, commit()
        self._path(name, "json").write_text(json.dumps({**data, "seconds": seconds, "commit": ended.commit}))
        self._end(ended)

    def _end(self, job: Ended, note: str = "") -> None:
        self.ended.append(job)
        print(f"[{len(self.ended)} of {len(JOBS)}] {job.name}: {job.how or f'{job.seconds:.0f} s'} {note}", flush=True)
        for part in job.parts:
            print("   ", part.line(), flush=True)
            for wrong in part.wrong[:5]:
                print("        WRONG:", wrong, flush=True)
        self._write()

    def _write(self) -> None:
        if self.out:
            status = f"Aborted by {signal.Signals(self.told).name}" if self.told else ""
            wall = time.monotonic() - self.start
            self.out.write_text(report(self.ended, self.scale, self.seed, status, wall, self.at_once))


def end_session(leader: int) -> None:
    """Kills what is left of a job: every process of its session, whatever its group."""
    for entry in os.listdir("/proc") if os.path.isdir("/proc/self") else []:
        if entry.isdigit() and session_of(int(entry)) == leader:
            with contextlib.suppress(OSError):
                os.kill(int(entry), signal.SIGKILL)


def session_of(pid: int) -> int:
    """The session of a living process; 0 if there is none."""
    return _stat(pid)[1]


def parent_of(pid: int) -> int:
    """The parent of a living process; 0 if there is none."""
    return _stat(pid)[0]


def _stat(pid: int) -> tuple[int, int]:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return 0, 0
    return (0, 0) if fields[0] in "ZX" else (int(fields[1]), int(fields[3]))


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    return done.stdout.strip() if done.returncode == 0 else "an exported tree"


def code_key() -> str:
    """Changes with the package's and the campaign's source."""
    digest = hashlib.sha256()
    sources = [*(ROOT / "fasttrain").glob("**/*.py"), *HERE.glob("*.[pc]*"), *(ROOT / "tests").glob("test_*.py")]
    for path in sorted(path for path in sources if path.is_file()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=1.0, help="of random trials; what is exhaustive is not scaled")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at-once", type=int, default=min(2, os.cpu_count() or 1), help="jobs at a time")
    parser.add_argument("--out", type=Path, help="the report")
    parser.add_argument("--only", default="", help="runs those whose name matches this regular expression")
    parser.add_argument("--keep", type=Path, help="where results are kept and found (default: by code, scale and seed)")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        return run_job(arguments.job, arguments.scale, arguments.seed, arguments.result)
    kept = ROOT / "build" / "torture" / f"{code_key()}-{arguments.scale:g}-{arguments.seed}"
    folder = arguments.keep or kept
    folder.mkdir(parents=True, exist_ok=True)
    runner = Runner(folder, arguments.scale, arguments.seed, arguments.at_once, arguments.out)
    return runner.run([job.name for job in JOBS], arguments.only)


if __name__ == "__main__":
    raise SystemExit(main())
