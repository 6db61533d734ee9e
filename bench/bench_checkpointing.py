"""Saving a training state: how long until it is durable, beside what people use, and how long a step stalls for it.

The state is that of a 31 M parameter GPT with AdamW (weights and two moments, float32, 382 MB). Peers get one file for
the weights and one for the optimizer, each fsynced, and neither hash, rename nor manifest; ours is the whole save, with
SHA-256 of every byte. The stall is what a training step waits for when the saver works behind it: a copy in memory.

Every call begins on a disk and memory at rest: what the one before left unwritten is written, its blocks are given
back, and memory that a virtual machine gave back to its host meanwhile is faulted in again; else each call's time
depends on who freed what before it (up to threefold, for all contenders).
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from bench.common import compare
from fasttrain.checkpointing import load_checkpoint, save_checkpoint, verify_checkpoint
from fasttrain.config import TrainConfig
from fasttrain.saver import CheckpointSaver
from fasttrain.verification import first_difference

STEP = 1


def state_of() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    shapes = {f"blocks.{i}.{name}": shape for i in range(8) for name, shape in
              {"qkv": (1536, 512), "out": (512, 512), "gate_up": (2816, 512), "down": (512, 1408)}.items()}
    shapes["token_embedding"] = (12_000, 512)
    model = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    moments = {index: {"exp_avg": w * 0.1, "exp_avg_sq": w * w} for index, w in enumerate(model.values())}
    return {"model": model, "optimizer": {"state": moments}, "training": {"step": STEP}}


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


class Place:
    """A folder on the disk beside this file (not in /tmp: that may be memory, where an fsync is free) and the state."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.trees = folder, state_of()
        moments = self.trees["optimizer"]["state"]
        self.flat = {f"{index}.{key}": t for index, entry in moments.items() for key, t in entry.items()}
        self.size = sum(t.nbytes for t in [*self.trees["model"].values(), *self.flat.values()])

    def with_safetensors(self) -> None:
        safetensors.torch.save_file(self.trees["model"], self.folder / "model.safetensors")
        safetensors.torch.save_file(self.flat, self.folder / "optimizer.safetensors")
        for name in ("model.safetensors", "optimizer.safetensors", ""):
            fsync(self.folder / name)

    def with_torch(self) -> None:
        torch.save(self.trees["model"], self.folder / "model.pt")
        torch.save(self.trees["optimizer"], self.folder / "optimizer.pt")
        for name in ("model.pt", "optimizer.pt", ""):
            fsync(self.folder / name)

    def until_durable(self) -> None:
        save_checkpoint(self.folder / "sync", STEP, self.trees, metadata={})

    def empty(self) -> None:
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        os.sync()
        time.sleep(0.3)  # the file system gives blocks back to the disk behind the sync
        torch.empty(2 * self.size, dtype=torch.uint8).fill_(1)

    def check(self, root: str) -> None:
        path = self.folder / root / f"step-{STEP:08d}"
        assert verify_checkpoint(path) == [] and first_difference(self.trees, load_checkpoint(path)) == ""


@pytest.fixture
def place() -> Iterator[Place]:
    with tempfile.TemporaryDirectory(dir=Path(__file__).parent) as folder:
        yield Place(Path(folder))


def test_saving_a_training_state_until_it_is_durable(benchmark: Any, place: Place) -> None:
    place.until_durable()
    place.check("sync")
    compare(benchmark, "saving a training state until it is durable", f"{place.size / 1e6:.0f} MB", place.until_durable,
            {"torch.save + fsync": place.with_torch, "safetensors + fsync": place.with_safetensors},
            rounds=15, prepare=place.empty, rotate=True)


def test_the_stall_of_a_step_that_saves(benchmark: Any, place: Place) -> None:
    saver = CheckpointSaver(place.folder / "behind", TrainConfig(), log=lambda line: None)

    def stall() -> None:
        saver.save(STEP, place.trees, {})

    def prepare() -> None:
        saver.collect(wait=True)
        place.empty()

    stall()
    saver.collect(wait=True)
    place.check("behind")
    compare(benchmark, "the stall of a step that saves behind", f"{place.size / 1e6:.0f} MB", stall,
            {"synchronous save": place.until_durable}, rounds=9, prepare=prepare)
    prepare()
