"""The parts of the reliability campaign: `make torture` (jobs.py) runs them whole, test_torture.py a short form.
Every part has its count, its seed and, with none wrong of N, the bound 3/N (95 %)."""

from __future__ import annotations

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
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(ROOT)]

import torch  # noqa: E402
from crash_images import build, crash_images  # noqa: E402
from tiny_runs import plain_loader, tiny_gpt, tiny_trainer, token_loader  # noqa: E402

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
    counts: dict[str, int] = field(default_factory=dict)
    """Numbers that the note names in braces; those of several jobs are added."""
    seconds: list[float] = field(default_factory=list)
    """Durations, whose {p50} and {p99} in milliseconds the note may name."""

    def line(self) -> str:
        bound = f"≤ {3 / self.trials:.2g}" if self.trials >= 10 and not self.wrong else ""
        times = sorted(self.seconds) or [0.0]
        at = {"p50": f"{times[len(times) // 2] * 1e3:.0f} ms", "p99": f"{times[len(times) * 99 // 100] * 1e3:.0f} ms"}
        note = self.note.format(**self.counts, **at)
        return f"| {self.name} | {self.trials:,} | {len(self.wrong)} | {bound} | {note} |"


def fork() -> int:
    """os.fork, with the child in a process group of its own: a signal to this job's group is not one to the child."""
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
    return pid


def compile_shim(folder: Path) -> Path:
    target = folder / "faultfs.so"
    subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-o", target, HERE / "faultfs.c", "-ldl"], check=True)
    return target


def weather(folder: Path, stride: int, kills: int, seed: int, kinds: str = "") -> list[Part]:
    """Kills and errors at every call, by the shim, in a process of its own; `kinds`: those with this in their name."""
    shim = compile_shim(folder)
    environment = {
        **os.environ,
        "LD_PRELOAD": str(shim),
        "FAULTFS": str(shim),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, str(HERE / "weather.py"), str(stride), str(kills), str(seed), kinds],
        capture_output=True,
        text=True,
        env=environment,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    result = json.loads(done.stdout.splitlines()[-1])
    parts = [Part(kind, item["trials"], item["wrong"]) for kind, item in result["kinds"].items()]
    for part in parts:
        if "random" not in part.name:
            part.note = f"each call in 5 scenarios; one save of this tiny state makes {result['calls']}"
    small = result.get("full tmpfs")
    if small is not None:
        count, wrong = 2 if small.startswith("ok") else 0, [small] if small.startswith("WRONG") else []
        parts.append(Part("a real full tmpfs", count, wrong, small))
    return parts


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
    pid = fork()
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


LOADERS: dict[str, Callable[[], Any]] = {
    "TokenLoader": token_loader,
    "DataLoader(shuffle=True, num_workers=0)": lambda: plain_loader(num_workers=0),
    "DataLoader(shuffle=True, num_workers=2)": lambda: plain_loader(num_workers=2),
}


def exact_resume(chains: int, seed: int, kinds: tuple[str, ...] = tuple(LOADERS), stops_at: Any = range(1, 15)) -> Part:
    """Ledgers of interrupted runs against the uninterrupted one, byte for byte."""
    chance, part = random.Random(seed), Part("interrupted = uninterrupted, ledgers compared byte for byte", 0)
    stops = 0
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        for kind, make in ((kind, LOADERS[kind]) for kind in kinds):
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
    part.counts = {"stops": stops}
    part.note = (
        "{stops} interruptions in chains of 1 to 5, at every micro-step of the loaders without workers; accumulation "
        f"1, 3, 4; dropout 0.1; 3 epochs; TokenLoader, DataLoader(shuffle=True) with 0 and 2 workers; seed {seed}"
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
                pid = fork()
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
    part.counts = {"lives": lives}
    part.note = "{lives} runs of 40 steps killed again and again, each ends with the straight run's bits"
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
    chance, part = random.Random(seed), Part("signals at random instants", 0)
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        for index in range(count):
            directory, number = Path(folder) / str(index), numbers[index % 3]
            read, write = os.pipe()
            pid = fork()
            if pid == 0:
                interrupted_run(directory, write, early=index % 4 == 0)
            os.close(write)
            os.read(read, 1)
            time.sleep(chance.random() * 0.04)
            start = time.perf_counter()
            os.kill(pid, number)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            part.seconds.append(time.perf_counter() - start)
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
    part.note = (
        "exit codes 130, 138, 143, checkpoint of the step itself; signal to exit p50 {p50}, p99 {p99}; a quarter of "
        "them in preflight"
    )
    return part


def concurrent(seconds: float) -> Part:
    """Two processes save, replace and prune one directory while this one loads."""
    part = Part("torn reads with two processes writing", 0)
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        root, children = Path(folder), []
        for number in range(2):
            pid = fork()
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


def forged_bombs() -> dict[str, Callable[[Path], object]]:
    """Checkpoints that are small on the disk and would be large in memory, or just as large as they say."""
    import test_checkpoint_damage as damage

    def loop(before: bytes, middle: bytes, count: int, after: bytes) -> Callable[[Path], object]:
        return lambda path: damage.forge(path, "loop.json", before + middle * count + after)

    def tensors(header: dict[str, Any], size: int) -> Callable[[Path], object]:
        def run(path: Path) -> None:
            structure = json.dumps({name: {"$tensor": name} for name in header}).encode()
            damage.forge(path, "model.json", structure)
            damage.forge(path, "model.safetensors", damage.tensors_file(header, bytes(size)))
            listed = {name: [item["dtype"], item["shape"], "0" * 16] for name, item in header.items()}
            damage.reseal(path, lambda body: body["trees"]["model"].__setitem__("tensors", listed))

        return run

    def manifest(value: Any, count: int) -> Callable[[Path], object]:
        return lambda path: damage.reseal(path, lambda body: body["metadata"].__setitem__("x", value * count))

    def trees(count: int, data: bytes) -> Callable[[Path], object]:
        def run(path: Path) -> None:
            entry = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for index in range(count):
                (path / f"t{index}.json").write_bytes(data)
            more = {f"t{i}": {"files": {f"t{i}.json": entry}, "tensors": {}} for i in range(count)}
            damage.reseal(path, lambda body: body["trees"].update(more))

        return run

    mega = 2**20
    deep = b"[" * 30 + b"]" * 30 + b","
    empty = {f"t{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(100_000)}
    odd = {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
           "w": {"dtype": "F32", "shape": [8 * mega], "data_offsets": [1, 32 * mega + 1]}}
    flags = {"m": {"dtype": "BOOL", "shape": [48 * mega], "data_offsets": [0, 48 * mega]}}
    bombs: dict[str, Callable[[Path], object]] = {
        f"{count:,} x {text.decode()}": loop(b"[", text, count, b"0]")
        for count in (10**5, 3 * 10**5, 10**6, 6 * 10**6)
        for text in (b"[],", b"{},", b"[0],", b'{"":0},', b"1.5,", b'"ab",', b'{"$tuple":[]},')
    }
    for count in (3000, 10_000, 60_000):
        bombs[f"{count:,} x 30 lists deep"] = loop(b"[", deep, count, b"0]")
    for size in (1, 8, 30, 60):
        for name, letters in {"ascii": b"a", "escapes": b"\\n", "wide": "é".encode()}.items():
            count = size * mega // len(letters)
            wide_ends = {"": b"", " and a wide letter": b"\\ud83d\\ude00", " and a raw one": "😀".encode()}
            for more, wide in wide_ends.items():
                bombs[f"{size} MiB of {name}{more}"] = loop(b'"', letters, count, wide + b'"')
    for count in (10**4, 10**5, 10**6):
        bombs[f"a table of {count:,} names"] = lambda path, count=count: damage.forge(
            path, "loop.json", b"{" + b",".join(b'"%x":%d' % (i, i + 1000) for i in range(count)) + b"}")
        bombs[f"{count:,} empty lists in the manifest"] = manifest([[]], count)
    bombs["40 MiB of text in the manifest"] = manifest("a", 40 * mega)
    bombs["20 MiB of quotes in the manifest"] = manifest('"', 20 * mega)
    bombs["100,000 empty tensors"] = tensors(empty, 0)
    bombs["20,000 empty tensors"] = tensors(dict(list(empty.items())[:20_000]), 0)
    bombs["a misaligned tensor of 32 MiB"] = tensors(odd, 32 * mega + 1)
    bombs["48 MiB of booleans"] = tensors(flags, 48 * mega)
    bombs["200 trees of 100,000 lists"] = trees(200, b"[" + b"[]," * 100_000 + b"0]")
    bombs["20 trees of 4 MiB of text"] = trees(20, b'"' + b"a" * (4 * mega) + b'"')
    return bombs


def memory_of(work: Callable[[], object]) -> tuple[int, str]:
    """Bytes of resident memory that `work` takes at its peak in a forked child, and how it ended."""
    read, write = os.pipe()
    pid = fork()
    if pid == 0:
        try:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
            before = _resident("VmRSS")
            try:
                work()
                ended = "loaded"
            except ValueError:
                ended = "refused"
            os.write(write, json.dumps([_resident("VmHWM") - before, ended]).encode())
            os._exit(0)
        finally:
            os._exit(1)
    os.close(write)
    with os.fdopen(read) as pipe:
        told = pipe.read()
    os.waitpid(pid, 0)
    return tuple(json.loads(told)) if told else (0, "broke")  # type: ignore[return-value]


def _resident(key: str) -> int:
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))


def hostile_memory(stride: int) -> Part:
    """Peak memory of loading hostile checkpoints, every byte of every tensor touched: at most twice the size of the
    files, and 64 MiB."""
    import test_checkpoint_damage as damage

    part, worst = Part("memory of hostile checkpoints ≤ twice their size + 64 MiB", 0), 0.0
    loaded = 0

    def load(path: Path) -> None:
        for tensor in load_checkpoint(path)["model"].values():
            if tensor.numel():
                int(tensor.reshape(-1).view(torch.uint8)[::64].max())  # touches every page, and makes no copy

    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        root = Path(folder) / "memory"
        load(damage.save(root, 1))  # what reading needs once is there
        for name, forge in list({**damage.HOSTILE, **forged_bombs()}.items())[::stride]:
            shutil.rmtree(root)
            path = damage.save(root, 2)
            forge(path)
            size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
            used, ended = memory_of(lambda path=path: load(path))
            part.trials += 1
            loaded += ended == "loaded"
            worst = max(worst, (used - 2 * size) / 2**20)
            if used > 2 * size + 64 * 2**20 or ended == "broke":
                part.wrong.append(f"{name}: {used / 2**20:.0f} MiB for {size / 2**20:.1f} MiB of files, {ended}")
    part.note = (f"VmHWM of a child that loads and touches every byte, above its start; the worst took twice its size "
                 f"and {worst:.0f} MiB; {loaded} were within the limits and loaded")
    return part
