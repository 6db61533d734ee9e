"""The reliability campaign: `make torture` runs it whole and writes bench/results/reliability.md; test_torture.py runs
a short form of each part. Every part prints its count, its seed and, with none wrong of N, the bound 3/N (95 %)."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(ROOT)]

import peers  # noqa: E402
import torch  # noqa: E402
from crash_images import build, crash_images  # noqa: E402
from mutants import MUTANTS, survivors  # noqa: E402
from tiny_runs import BATCH, LENGTH, plain_loader, tiny_gpt, tiny_trainer, token_loader  # noqa: E402

from fasttrain.callbacks import Callback, SampleText  # noqa: E402
from fasttrain.checkpointing import (  # noqa: E402
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    read_manifest,
    save_checkpoint,
)
from fasttrain.losses import batch_loss  # noqa: E402
from fasttrain.retention import prune_checkpoints  # noqa: E402
from fasttrain.verification import first_difference  # noqa: E402

MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


@dataclass
class Part:
    """One line of the report."""

    name: str
    trials: int
    wrong: list[str] = field(default_factory=list)
    note: str = ""

    def line(self) -> str:
        bound = f"≤ {3 / self.trials:.2g}" if self.trials >= 10 and not self.wrong else ""
        return f"| {self.name} | {self.trials:,} | {len(self.wrong)} | {bound} | {self.note} |"


def compile_shim(folder: Path) -> Path:
    target = folder / "faultfs.so"
    subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-o", target, HERE / "faultfs.c", "-ldl"], check=True)
    return target


def weather(folder: Path, stride: int, kills: int, seed: int) -> list[Part]:
    """Kills and errors at every call, by the shim, in a process of its own."""
    shim = compile_shim(folder)
    environment = {
        **os.environ,
        "LD_PRELOAD": str(shim),
        "FAULTFS": str(shim),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, str(HERE / "weather.py"), str(stride), str(kills), str(seed)],
        capture_output=True,
        text=True,
        env=environment,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    result = json.loads(done.stdout.splitlines()[-1])
    parts = [Part(kind, item["trials"], item["wrong"]) for kind, item in result["kinds"].items()]
    parts[0].note = f"a save of this tiny state makes {result['calls']} calls; 5 scenarios"
    small = result["full tmpfs"]
    return [
        *parts,
        Part(
            "a real full tmpfs",
            2 if small.startswith("ok") else 0,
            [small] if small.startswith("WRONG") else [],
            small,
        ),
    ]


def trees_of(mark: float) -> dict[str, Any]:
    return {"model": {"w": torch.full((40,), mark), "b": torch.tensor(mark)}, "training": {"mark": mark}}


def save(root: Path, step: int, mark: float | None = None) -> Path:
    value = float(step) if mark is None else mark
    return save_checkpoint(root, step, trees_of(value), metadata={"val_loss": value})


def mark_of(path: Path | None) -> float | None:
    if path is None:
        return None
    trees = load_checkpoint(path)
    marks = {*trees["model"]["w"].tolist(), trees["model"]["b"].item(), trees["training"]["mark"]}
    return float(marks.pop()) if len(marks) == 1 else -1.0


def power_cuts(most: int) -> Part:
    scenarios: list[tuple[Callable[[Path], object], Callable[[Path], object], set[float | None]]] = [
        (lambda root: None, lambda root: save(root, 1), {None, 1.0}),
        (lambda root: save(root, 1), lambda root: save(root, 2), {1.0, 2.0}),
        (lambda root: save(root, 1), lambda root: save(root, 1, 7.0), {1.0, 7.0}),
        (
            lambda root: [save(root, step) for step in (1, 2, 3)],
            lambda root: (save(root, 4), prune_checkpoints(root, keep_last=1, keep_best=0)),
            {3.0, 4.0},
        ),
    ]
    part = Part(
        "power cut: images of the disk", 0, note="every prefix of the operations × pending names × unsynced bytes"
    )
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        root = Path(folder) / "image"
        for index, (prepare, work, allowed) in enumerate(scenarios):
            images = list(crash_images(prepare, work))
            for image in images[:: max(1, len(images) * len(scenarios) // most)]:
                build(image, root)
                part.trials += 1
                state = mark_of(latest_checkpoint(root, log=lambda line: None))
                if state not in allowed:
                    part.wrong.append(f"scenario {index}: {state} of {sorted(image)}")
    return part


def ledger_hash(trainer: Any) -> str:
    digest = hashlib.sha256()
    trees = trainer.state.capture()

    def walk(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            digest.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key in value:
                digest.update(str(key).encode())
                walk(value[key])
        elif isinstance(value, (list, tuple)):
            for item in value:
                walk(item)
        else:
            digest.update(repr(value).encode())

    for tree in ("model", "optimizer", "rng"):
        walk(trees[tree])
    return digest.hexdigest()


class Ledger(Callback):
    """One line a step: step, sample ids of its micro-batches, learning rate and loss in bits, hash of weights,
    optimizer and generators. A resumed run drops what comes after its checkpoint, as a log of its own would."""

    def __init__(self, path: Path) -> None:
        self.path, self.ids, self.trainer = path, list[str](), None
        self.carried: list[str] = []

    def loss(self, stop_at: int = 0) -> Any:
        """batch_loss that notes the batch, and sends SIGTERM during the `stop_at`-th call."""
        calls = [0]

        def run(model: Any, batch: Any) -> Any:
            calls[0] += 1
            ids = batch["input_ids"] if isinstance(batch, dict) else batch[0]
            self.ids.append(hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:8])
            if calls[0] == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return batch_loss(model, batch)

        return run

    def on_step(self, state: Any) -> None:
        counters = state.counters
        bits = [struct.pack(">d", value).hex() for value in (counters.last_lr, counters.last_loss)]
        with open(self.path, "a") as file:
            print(state.step, *bits, ",".join(self.ids), ledger_hash(self.trainer), file=file)
        self.ids.clear()

    def state_dict(self) -> dict[str, Any]:
        return {"ids": list(self.ids)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.ids = list(state["ids"])


def session(
    directory: Path, ledger: Path, make_loader: Callable[[], Any], stop_at: int, seed: int, **settings: Any
) -> None:
    """One life of a run, in a process of its own as it would be."""
    pid = os.fork()
    if pid:
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status in (0, 128 + signal.SIGTERM), f"a session ended with {status}"
        return
    try:
        notes = Ledger(ledger)
        trainer = tiny_trainer(
            directory, make_loader(), tiny_gpt(seed=seed), callbacks=[notes], loss_fn=notes.loss(stop_at), **settings
        )
        notes.trainer = trainer
        torch.manual_seed(seed)
        os._exit(trainer.train().exit_code)
    finally:
        os._exit(1)


def exact_resume(chains: int, seed: int, workers: tuple[int, ...] = (0, 2), stops_at: Any = range(1, 15)) -> Part:
    """Ledgers of interrupted runs against the uninterrupted one, byte for byte."""
    chance, part = random.Random(seed), Part("interrupted = uninterrupted, ledgers compared byte for byte", 0)
    kinds: dict[str, Callable[[], Any]] = {"TokenLoader": lambda: token_loader()}
    for count in workers:
        kinds[f"DataLoader(shuffle=True, num_workers={count})"] = lambda count=count: plain_loader(num_workers=count)
    stops = 0
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        for kind, make in kinds.items():
            for accum in (1, 3, 4):
                settings = {"max_steps": 0, "max_epochs": 3, "grad_accum_steps": accum, "warmup_steps": 2}
                base = Path(folder) / f"{len(list(Path(folder).iterdir()))}"
                base.mkdir()
                session(base / "straight", base / "straight.txt", make, 0, 0, **settings)
                expected = (base / "straight.txt").read_bytes()
                every = [[stop] for stop in stops_at] if "num_workers=2" not in kind else []
                for plan in [
                    *every,
                    *([chance.randrange(1, 6) for _ in range(chance.randrange(1, 6))] for _ in range(chains)),
                ]:
                    shutil.rmtree(base / "cut", ignore_errors=True)
                    (base / "cut.txt").unlink(missing_ok=True)
                    for index, stop in enumerate([*plan, 0]):
                        session(base / "cut", base / "cut.txt", make, stop, index, **settings)
                    stops += len(plan)
                    part.trials += 1
                    if (base / "cut.txt").read_bytes() != expected:
                        part.wrong.append(f"{kind}, accum {accum}, stops {plan}")
    part.note = (
        f"{stops} interruptions in chains of 1 to 5, at every micro-step; accumulation 1, 3, 4; dropout 0.1; 3 "
        f"epochs; {', '.join(kinds)}; seed {seed}"
    )
    return part


def killed_runs(kills: int, seed: int) -> Part:
    """Random SIGKILLs in a running training that saves behind itself; the last run's end equals the straight one's."""
    chance, part = random.Random(seed), Part("SIGKILL at random in running training", 0)
    settings: dict[str, Any] = {"max_steps": 40, "save_every_steps": 1, "grad_accum_steps": 2, "keep_last": 2}

    def train(directory: Path, seed: int) -> Any:
        torch.manual_seed(seed)
        trainer = tiny_trainer(directory, plain_loader(7), tiny_gpt(seed=seed), **settings)
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.train()
        return trainer

    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        straight = train(Path(folder) / "straight", 0)
        expected = {name: t.clone() for name, t in straight.model.state_dict().items()}
        lives = 0
        while part.trials < kills:
            directory = Path(folder) / "killed"
            shutil.rmtree(directory, ignore_errors=True)
            lives += 1
            for attempt in range(200):
                pid = os.fork()
                if pid == 0:
                    try:
                        train(directory, attempt + 1 if list_checkpoints(directory) else 0)  # fresh as the straight one
                        os._exit(0)
                    finally:
                        os._exit(1)
                time.sleep(0.01 + chance.random() * 0.25)
                os.kill(pid, signal.SIGKILL)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                before = list_checkpoints(directory)
                found = latest_checkpoint(directory, log=lambda line: None)
                if code == 1:
                    part.wrong.append("the run itself failed")
                if before and found != before[-1]:
                    part.wrong.append(f"newest of {[p.name for p in before]} does not verify")
                if code == 0:
                    break
                part.trials += 1
            end = load_checkpoint(latest_checkpoint(directory, log=print) or directory)["model"]
            if first_difference(expected, end):
                part.wrong.append(f"the end of life {lives} differs in {first_difference(expected, end)}")
    part.note = (
        f"{lives} runs of 40 steps killed again and again, each ends with the straight run's bits; seed {seed}"
    )
    return part


class _Letters:
    vocab_size, eos_token_id = 29, None

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - ord("a") for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(ord("a") + index) for index in ids)


def interrupted_run(directory: Path, write: int, early: bool) -> None:
    """A forked child's whole life: writes "!" once it may be signalled, and how it ended. `early`: in preflight."""

    class Ready(Callback):
        def on_step(self, state: Any) -> None:
            if state.step == 1 and not early:
                os.write(write, b"!")

    try:
        sampler = SampleText("ab", every_steps=2, max_new_tokens=5)
        settings = {"max_steps": 10**6, "eval_every_steps": 2, "save_every_steps": 3, "preflight": True}
        trainer = tiny_trainer(
            directory, plain_loader(), callbacks=[sampler, Ready()], val_dataloader=token_loader(3), **settings
        )
        trainer.tokenizer = _Letters()
        if early:
            real = trainer.preflight
            trainer.preflight = lambda: (os.write(write, b"!"), real())[1]  # type: ignore[method-assign]
        with contextlib.redirect_stdout(io.StringIO()):
            result = trainer.train()
        os.write(write, f"{result.step} {result.status}".encode())
        os._exit(result.exit_code)
    finally:
        os._exit(1)


def signals(count: int, seed: int) -> Part:
    """Signals at random instants: preflight, step, evaluation, generation, save; exit code and checkpoint checked."""
    chance, part, latencies = random.Random(seed), Part("signals at random instants", 0), []
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        for index in range(count):
            directory, number = Path(folder) / str(index), numbers[index % 3]
            read, write = os.pipe()
            pid = os.fork()
            if pid == 0:
                interrupted_run(directory, write, early=index % 4 == 0)
            os.close(write)
            os.read(read, 1)
            time.sleep(chance.random() * 0.04)
            start = time.perf_counter()
            os.kill(pid, number)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            latencies.append(time.perf_counter() - start)
            with os.fdopen(read) as pipe:
                told = pipe.read().lstrip("!").split()
            found = latest_checkpoint(directory, log=lambda line: None)
            part.trials += 1
            if (
                code != 128 + number
                or told[1:] != ["interrupted"]
                or found is None
                or read_manifest(found).step != int(told[0])
            ):
                part.wrong.append(f"{signal.Signals(number).name}: exit {code}, told {told}, newest {found}")
            shutil.rmtree(directory, ignore_errors=True)
    latencies.sort()
    part.note = (
        f"exit codes 130, 138, 143, checkpoint of the step itself; signal to exit p50 "
        f"{latencies[len(latencies) // 2] * 1e3:.0f} ms, p99 {latencies[len(latencies) * 99 // 100] * 1e3:.0f} "
        f"ms; a quarter of them in preflight; seed {seed}"
    )
    return part


def concurrent(seconds: float) -> Part:
    """Two processes save, replace and prune one directory while this one loads."""
    part = Part("torn reads with two processes writing", 0)
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        root, children = Path(folder), []
        for number in range(2):
            pid = os.fork()
            if pid == 0:
                try:
                    end, index = time.monotonic() + seconds, 0
                    while time.monotonic() < end:
                        step = index * 2 + number if index % 3 else index * 2
                        save(root, step)
                        prune_checkpoints(root, keep_last=2, keep_best=1)
                        index += 1
                    os._exit(0)
                finally:
                    os._exit(1)
            children.append(pid)
        end, lines = time.monotonic() + seconds, list[str]()
        while time.monotonic() < end:
            path = latest_checkpoint(root, log=lines.append)
            if path is None:
                continue
            try:
                mark = mark_of(path)
            except ValueError:
                continue  # pruned or replaced between the two calls
            part.trials += 1
            if mark != float(path.name[5:].rstrip("~")):
                part.wrong.append(f"{path.name} holds {mark}")
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
        part.wrong += [f"a writer ended with {code}" for code in codes if code] + lines
    part.note = f"loads in {seconds:.0f} s, each whole and of its own step"
    return part


def hostile(fuzz_seconds: float, seed: int) -> list[Part]:
    import test_checkpoint_damage as damage

    from fasttrain.checkpointing import verify_checkpoint
    from fasttrain.manifest import open_manifest
    from fasttrain.tensorfile import parse_header

    part = Part(
        "hostile checkpoints refused", 0, note="headers, trees, manifests; opens and imports are watched by the test"
    )
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        for name, forge in damage.HOSTILE.items():
            root = Path(folder) / "hostile"
            shutil.rmtree(root, ignore_errors=True)
            damage.save(root, 1)
            path = damage.save(root, 2)
            forge(path)
            part.trials += 1
            if not verify_checkpoint(path):
                part.wrong.append(name)
        sealed = (damage.save(Path(folder) / "good", 1) / "manifest.json").read_bytes()
    chance, fuzz = (
        random.Random(seed),
        Part("fuzzed headers and manifests: an error or a table", 0, note=f"seed {seed}"),
    )
    header = damage.tensors_file(damage.header())
    end = time.monotonic() + fuzz_seconds
    body = sealed[sealed.index(b'"manifest":') + 11 : -2]
    while time.monotonic() < end:
        for good, parse in (
            (header, lambda data: parse_header(data, len(data), "fuzz")),
            (body, _open_sealed(open_manifest)),
        ):
            bad = bytearray(good)
            for _ in range(chance.randrange(1, 6)):
                place = chance.randrange(len(bad) - (164 if good is header else 0))
                choice = chance.randrange(3)
                if choice == 0:
                    bad[place] = chance.randrange(256)
                elif choice == 1:
                    bad[place:place] = chance.choice([b"{", b"[", b'"', b"0", b"-", b"9" * 30, b"null", b"\\u0000"])
                else:
                    del bad[place : place + chance.randrange(1, 9)]
            fuzz.trials += 1
            try:
                parse(bytes(bad))
            except ValueError:
                pass
            except Exception as error:
                fuzz.wrong.append(f"{type(error).__name__}: {error}")
    return [part, fuzz]


def _open_sealed(open_manifest: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def parse(body: bytes) -> Any:
        digest = hashlib.sha256(body).hexdigest().encode()
        return open_manifest(b'{"sha256":"%s","manifest":%s}\n' % (digest, body))

    return parse


def run(scale: float, seed: int) -> tuple[list[Part], list[str]]:
    """All parts, and the lines of the table with the peers. Random trials are scaled; what is exhaustive is not."""
    torch.set_num_threads(1)
    parts: list[Part] = []

    def add(*new: Part) -> None:
        for part in new:
            print(part.line(), flush=True, file=sys.__stdout__)
            for wrong in part.wrong[:5]:
                print("    WRONG:", wrong, flush=True, file=sys.__stdout__)
            parts.append(part)

    def scaled(count: int) -> int:
        return max(1, round(count * scale))

    with tempfile.TemporaryDirectory() as folder:
        add(*weather(Path(folder), 1, scaled(2000), seed))
    add(power_cuts(10**9))
    add(exact_resume(scaled(12), seed))
    add(killed_runs(scaled(1200), seed))
    add(signals(scaled(1000), seed))
    add(concurrent(60.0 * scale))
    add(*hostile(60.0 * scale, seed))
    table = peers.table(1000, seed, with_trainers=True)
    print("\n".join(table), flush=True, file=sys.__stdout__)
    if scale >= 1:
        alive = survivors()
        names = "; ".join(mutant.name for mutant in MUTANTS)
        add(Part("mutants of the safety code caught by the tests", len(MUTANTS), alive, names))
    return parts, table


def report(parts: list[Part], table: list[str], seconds: float, seed: int, scale: float) -> str:
    import platform

    return "\n".join(
        [
            "# Reliability of checkpoints",
            "",
            f"Made by `make torture` (scale {scale:g}) in {seconds / 60:.0f} min; torch {torch.__version__}, Python "
            f"{platform.python_version()}, Linux {platform.release().split('-')[0]}, files on tmpfs, seed {seed}. A "
            "bound is 3/N: with none wrong in N trials, the true share is below it (95 % confidence). Real power cuts, "
            "network file systems, GPUs: not tried.",
            "",
            "| what | trials | wrong | bound | |",
            "|---|---|---|---|---|",
            *(part.line() for part in parts),
            "",
            "## One flipped bit, or one cut, and what loading makes of it",
            "",
            *table,
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=1.0, help="of random trials; below 1 without mutants")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    start = time.monotonic()
    # The runs' own reports go nowhere; lines of this one go to the real stdout.
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parts, table = run(arguments.scale, arguments.seed)
    text = report(parts, table, time.monotonic() - start, arguments.seed, arguments.scale)
    if arguments.out:
        arguments.out.write_text(text)
    return int(any(part.wrong for part in parts))


if __name__ == "__main__":
    assert BATCH and LENGTH
    raise SystemExit(main())
