"""Saving a training state: the stall of a step, and the time until the checkpoint is durable, beside what people use.

The state is that of a 31 M parameter GPT with AdamW (weights and two moments, float32, 375 MB). Peers get one file for
the weights and one for the optimizer, each fsynced, and neither rename nor verify. `fasttrain` is what a training step
waits for: the copy into memory. "until durable" is the whole synchronous save, with SHA-256 of every byte.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

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


def test_saving_a_training_state(benchmark: Any, tmp_path: Path) -> None:
    # Beside this file, not in /tmp: that may be memory, where an fsync is free.
    with tempfile.TemporaryDirectory(dir=Path(__file__).parent) as folder:
        run(benchmark, Path(folder))


def run(benchmark: Any, folder: Path) -> None:
    trees = state_of()
    flat = {f"{index}.{key}": t for index, entry in trees["optimizer"]["state"].items() for key, t in entry.items()}
    size = sum(t.nbytes for t in [*trees["model"].values(), *flat.values()])

    def with_safetensors() -> None:
        safetensors.torch.save_file(trees["model"], folder / "model.safetensors")
        safetensors.torch.save_file(flat, folder / "optimizer.safetensors")
        fsync(folder / "model.safetensors")
        fsync(folder / "optimizer.safetensors")
        fsync(folder)

    def with_torch() -> None:
        torch.save(trees["model"], folder / "model.pt")
        torch.save(trees["optimizer"], folder / "optimizer.pt")
        fsync(folder / "model.pt")
        fsync(folder / "optimizer.pt")
        fsync(folder)

    def until_durable() -> None:
        save_checkpoint(folder / "sync", STEP, trees, metadata={})

    saver = CheckpointSaver(folder / "behind", TrainConfig(), log=lambda line: None)

    def stall() -> None:
        saver.save(STEP, trees, {})

    def prepare() -> None:
        saver.collect(wait=True)
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        os.sync()  # nobody pays for what another left unwritten,
        time.sleep(0.3)  # nor for blocks that the file system gives back to the disk behind the sync,
        # nor for memory that a virtual machine gave back to its host and must fault in again, as files' pages are.
        torch.empty(2 * size, dtype=torch.uint8).fill_(1)

    stall()
    until_durable()
    saver.collect(wait=True)
    for root in ("sync", "behind"):
        path = folder / root / f"step-{STEP:08d}"
        assert verify_checkpoint(path) == [] and first_difference(trees, load_checkpoint(path)) == ""
    compare(
        benchmark, "saving a training state", f"{size / 1e6:.0f} MB", stall,
        {"torch.save + fsync": with_torch, "safetensors + fsync": with_safetensors, "until durable": until_durable},
        rounds=12, prepare=prepare, rotate=True,
    )
    prepare()
