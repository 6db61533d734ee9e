"""The corruption table: the same flips and cuts in the files of fasttrain and of what people use, loaded by each one's
own loader. A trial is *silent* if loading succeeds with other tensors than were saved.

`python tests/torture/peers.py` prints it. A trainer that is not installed here is run by the interpreter that
PEERS_PYTHON names, if it has it there; else the table says that it was not run."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import io
import logging
import os
import random
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from fasttrain.checkpointing import latest_checkpoint, load_checkpoint, save_checkpoint

Flat = Mapping[str, Tensor]


@dataclass(frozen=True)
class Contender:
    """`save` writes the tensors into an empty folder, `load` gives what is read back from it."""

    name: str
    save: Callable[[Path, Flat], object]
    load: Callable[[Path], Flat]


def _dcp() -> Contender:
    import torch.distributed.checkpoint as dcp

    shapes: dict[str, Tensor] = {}

    def save(folder: Path, tensors: Flat) -> None:
        shapes.update({name: torch.zeros_like(t) for name, t in tensors.items()})
        dcp.save(dict(tensors), checkpoint_id=folder)

    def load(folder: Path) -> Flat:
        into = {name: t.clone() for name, t in shapes.items()}
        dcp.load(into, checkpoint_id=folder)
        return into

    return Contender("torch.distributed.checkpoint (DCP)", save, load)


def contenders() -> list[Contender]:
    import safetensors.torch

    return [
        Contender(
            "fasttrain",
            lambda folder, t: save_checkpoint(folder, 1, {"model": dict(t)}, metadata={}),
            lambda folder: load_checkpoint(folder / "step-00000001")["model"],
        ),
        Contender(
            "safetensors",
            lambda folder, t: safetensors.torch.save_file(dict(t), folder / "m.safetensors"),
            lambda folder: safetensors.torch.load_file(folder / "m.safetensors"),
        ),
        Contender(
            "torch.save, torch.load(weights_only=True)",
            lambda folder, t: torch.save(dict(t), folder / "m.pt"),
            lambda folder: torch.load(folder / "m.pt", weights_only=True),
        ),
        _dcp(),
    ]


def hugging_face() -> Contender:
    """transformers.Trainer: the weights of its newest checkpoint folder, found and loaded by its own functions."""
    import transformers
    from transformers.trainer_utils import get_last_checkpoint

    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.b = torch.nn.Parameter(torch.zeros(64, 64)), torch.nn.Parameter(torch.zeros(64))

        def forward(self, x: Tensor, labels: Any = None) -> dict[str, Tensor]:
            return {"loss": (self.w.sum() + self.b.sum()) * x.sum() * 0}

    def trainer_in(folder: Path) -> Any:
        arguments = transformers.TrainingArguments(
            output_dir=str(folder),
            max_steps=1,
            save_steps=1,
            learning_rate=0.0,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            logging_strategy="no",
        )
        return transformers.Trainer(model=Plain(), args=arguments, train_dataset=[{"x": torch.ones(1)}] * 8)

    def save(folder: Path, tensors: Flat) -> None:
        trainer = trainer_in(folder)
        trainer.model.load_state_dict(dict(tensors))
        trainer.train()

    def load(folder: Path) -> Flat:
        trainer = trainer_in(folder)
        newest = get_last_checkpoint(str(folder))
        assert newest is not None
        trainer._load_from_checkpoint(newest)
        return {name: t.detach() for name, t in trainer.model.state_dict().items()}

    return Contender("transformers.Trainer (weights)", save, load)


def lightning() -> Contender:
    import lightning.pytorch as pl

    class Plain(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.b = torch.nn.Parameter(torch.zeros(64, 64)), torch.nn.Parameter(torch.zeros(64))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0)

        def training_step(self, batch: Any, index: int) -> Tensor:
            return (self.w.sum() + self.b.sum()) * 0

    def save(folder: Path, tensors: Flat) -> None:
        module = Plain()
        module.load_state_dict(dict(tensors))
        trainer = pl.Trainer(
            max_steps=1,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            enable_checkpointing=False,
        )
        trainer.fit(module, torch.utils.data.DataLoader([torch.ones(1)] * 2))
        trainer.save_checkpoint(folder / "m.ckpt")

    return Contender(
        "Lightning Trainer", save, lambda folder: Plain.load_from_checkpoint(folder / "m.ckpt").state_dict()
    )


def same(one: Flat, other: Flat) -> bool:
    return one.keys() == other.keys() and all(
        one[name].shape == other[name].shape
        and one[name].dtype == other[name].dtype
        and torch.equal(one[name].contiguous().view(torch.uint8), other[name].contiguous().view(torch.uint8))
        for name in one
    )


def damage(data: bytes, kind: str, chance: random.Random) -> bytes:
    place = chance.randrange(len(data))
    if kind == "flip":
        bad = bytearray(data)
        bad[place] ^= 1 << chance.randrange(8)
        return bytes(bad)
    if kind == "cut":
        return data[:place]
    page = place // 4096 * 4096
    return data[:page] + bytes(len(data[page : page + 4096])) + data[page + 4096 :]


def trials(contender: Contender, count: int, seed: int) -> dict[str, tuple[int, int, int]]:
    """kind -> (errors, harmless, silent). A file is drawn by its share of the bytes, as rot would."""
    generator, chance = torch.Generator().manual_seed(seed), random.Random(seed)
    tensors = {"w": torch.randn(64, 64, generator=generator), "b": torch.randn(64, generator=generator)}
    counts = {}
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as base:
        folder = Path(base) / "saved"
        folder.mkdir()
        with quiet():
            contender.save(folder, tensors)
            assert same(contender.load(folder), tensors), contender.name
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
        sizes = [path.stat().st_size for path in files]
        for kind in ("flip", "cut", "zero page"):
            tally = [0, 0, 0]
            for _ in range(count):
                file = chance.choices(files, sizes)[0]
                good = file.read_bytes()
                bad = damage(good, kind, chance)
                file.write_bytes(bad)
                try:
                    with quiet():
                        tally[1 if same(contender.load(folder), tensors) else 2] += 1
                except KeyboardInterrupt:
                    raise
                except BaseException:  # DCP's errors are no Exceptions
                    tally[0] += 1
                file.write_bytes(good)
            counts[kind] = (tally[0], tally[1], tally[2])
    return counts


@contextlib.contextmanager
def quiet() -> Any:
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def falls_back(count: int, seed: int) -> int:
    """Of `count` flips in the newest of two fasttrain checkpoints: how often the other one was found by itself."""
    chance, found = random.Random(seed), 0
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as base:
        for step in (1, 2):
            save_checkpoint(base, step, {"model": {"w": torch.full((4096,), float(step))}}, metadata={})
        files = sorted((Path(base) / "step-00000002").iterdir())
        for index in range(count):
            file = files[index % len(files)]  # every file alike, however small
            good = file.read_bytes()
            file.write_bytes(damage(good, "flip", chance))
            path = latest_checkpoint(base, log=lambda line: None)
            found += path is not None and bool(load_checkpoint(path)["model"]["w"].eq(1).all())
            file.write_bytes(good)
    return found


TRAINERS: dict[str, tuple[str, Callable[[], Contender]]] = {
    "transformers.Trainer (weights)": ("accelerate", hugging_face),
    "Lightning Trainer": ("lightning", lightning),
}


def version(module: str) -> str:
    name = "transformers" if module == "accelerate" else module
    return f"{importlib.metadata.version(name)} on torch {torch.__version__}"


def row(name: str, counts: Mapping[str, tuple[int, int, int]]) -> str:
    errors, harmless, silent = counts["flip"]
    number = sum(counts["flip"])
    return (f"| {name} | **{silent} of {number}** | {errors} | {harmless} | {counts['cut'][2]} of {number} "
            f"| {counts['zero page'][2]} of {number} |")


def table(count: int, seed: int, *, with_trainers: bool) -> list[str]:
    """Lines of markdown."""
    lines = [
        "| loader | single bit flipped: silent | errors | harmless | cut short: silent | a 4 KiB page zeroed: silent |",
        "|---|---|---|---|---|---|",
    ]
    absent = []
    for contender in contenders():
        counts = trials(contender, count, seed)
        lines.append(row(contender.name, counts))
        assert contender.name != "fasttrain" or not any(silent for _, _, silent in counts.values())
    for name, (needs, make) in TRAINERS.items() if with_trainers else ():
        number = max(1, count // 10)
        other = os.environ.get("PEERS_PYTHON")
        if importlib.util.find_spec(needs) is not None:
            lines.append(row(f"{name} {version(needs)}", trials(make(), number, seed)))
        elif other:
            command = [other, __file__, "--row", name, "--count", str(number), "--seed", str(seed)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}: {done.stderr[-1000:]}")
            lines.append(done.stdout.strip().splitlines()[-1])
        else:
            absent.append(f"{name} was not run: `{needs}` is not installed; PEERS_PYTHON names no interpreter.")
    found = falls_back(count, seed)
    assert found == count, f"fell back {found} of {count} times"
    lines += [
        "",
        f"fasttrain fell back to the older checkpoint by itself in {found} of {count} further flips. A file is drawn "
        "by its share of the bytes; harmless flips hit padding or unused metadata.",
        *absent,
    ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="Prints the corruption table.")
    parser.add_argument("--count", type=int, default=1000, help="trials of each kind; the trainers' are a tenth")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--row", choices=TRAINERS, help="one trainer's row of --count trials instead")
    arguments = parser.parse_args()
    if arguments.row:
        needs, make = TRAINERS[arguments.row]
        print(row(f"{arguments.row} {version(needs)}", trials(make(), arguments.count, arguments.seed)))
    else:
        print("\n".join(table(arguments.count, arguments.seed, with_trainers=True)))


if __name__ == "__main__":
    main()
