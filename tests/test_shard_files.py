"""Checkpoints that all ranks write: resumed on any number of ranks, under any way to spread the model."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import rank_cases
import torch
from rank_cases import finish, gpt, session, start
from safetensors.torch import load_file
from tiny_runs import one_thread, tiny_trainer, token_loader  # noqa: F401
from torch import Tensor

from fasttrain.checkpointing import list_checkpoints, load_checkpoint, read_manifest, verify_checkpoint
from fasttrain.shards import Pieces
from fasttrain.verification import first_difference


def linked(folder: Path, world_size: int, parallel: str, steps: int) -> tuple[dict[str, Tensor], list[int]]:
    """A session of the chain in `folder`: (the state afterwards, the batches in the order of the whole run)."""
    (folder / "steps").write_text(str(steps))
    if world_size == 1:
        return session(folder / "run", parallel, steps, plain=True, state_dtype=(folder / "dtype").read_text())
    finish(start(world_size, folder, f"link-{parallel}"))
    ledgers = [(folder / f"ledger-{rank}").read_text().split() for rank in range(world_size)]
    return load_file(folder / f"link-{parallel}.safetensors"), [int(batch) for turn in zip(*ledgers) for batch in turn]


@pytest.mark.parametrize(("chain", "state_dtype"), [
    ([(1, "auto", 1), (2, "fsdp", 3), (2, "ddp", 5), (1, "auto", 6)], "float32"),
    ([(2, "fsdp", 2), (1, "auto", 4), (4, "hsdp", 6)], "int8"),
])
def test_a_chain_of_sessions_is_one_run(tmp_path: Path, chain: list[tuple[int, str, int]], state_dtype: str) -> None:
    (tmp_path / "dtype").write_text(state_dtype)
    wanted, whole = session(tmp_path / "whole", "auto", 6, plain=True, state_dtype=state_dtype)
    seen: list[int] = []
    for world_size, parallel, steps in chain:
        state, ledger = linked(tmp_path, world_size, parallel, steps)
        seen += ledger
    assert seen == whole
    for name, tensor in wanted.items():
        loose = 5e-3 if state_dtype == "int8" else 2e-5
        assert torch.allclose(state[name].double(), tensor.double(), rtol=loose, atol=loose), name


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_window_that_was_left_open_is_finished_by_more_ranks(tmp_path: Path, parallel: str) -> None:
    (tmp_path / "dtype").write_text("float32")
    wanted, whole = session(tmp_path / "whole", "auto", 4, plain=True)
    _, first = session(tmp_path / "run", "auto", 4, plain=True, signal_at=10)
    assert len(first) == 10  # the second of the third step's four
    state, rest = linked(tmp_path, 2, parallel, 4)
    assert first + rest == whole
    for name, tensor in wanted.items():
        assert torch.allclose(state[name].double(), tensor.double(), rtol=2e-5, atol=2e-5), name


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks with dropout: `straight-fsdp` holds the checkpoints of steps 4 and 6 of one run."""
    folder = tmp_path_factory.mktemp("written")
    finish(start(2, folder, "continued-ddp", "continued-fsdp"))
    return folder


def test_as_many_ranks_go_on_bit_for_bit(written: Path) -> None:
    assert (written / "continued-ddp.safetensors").exists() and (written / "continued-fsdp.safetensors").exists()


def test_every_rank_writes_its_part_and_no_more(written: Path) -> None:
    path = list_checkpoints(written / "straight-fsdp")[-1]
    manifest = read_manifest(path)
    assert set(manifest.trees) == {"model", "optimizer", "training", "rng", "rank_00000", "rank_00001"}
    assert not (path / "model.safetensors").exists()
    sizes = [manifest.trees[f"rank_0000{rank}"].tensor_file.size for rank in (0, 1)]  # type: ignore[union-attr]
    assert max(sizes) < 1.1 * min(sizes)
    assert manifest.metadata["finite"] is True


def test_parts_are_read_without_the_whole(written: Path) -> None:
    path = list_checkpoints(written / "straight-fsdp")[-1]
    whole = load_checkpoint(path)["model"]
    pieces = load_checkpoint(path, ["model"], whole=False)["model"]
    for name, tensor in whole.items():
        assert isinstance(pieces[name], Pieces) and pieces[name].shape == tensor.shape
        rows = tensor.size(0) // 3
        assert pieces[name].cut((rows, *(0,) * (tensor.dim() - 1)), (rows, *tensor.shape[1:])).equal(
            tensor[rows:2 * rows])


def test_a_part_that_is_damaged_or_gone_is_never_used(written: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    shutil.copytree(written / "straight-fsdp", root)
    newest, file = list_checkpoints(root)[-1], list_checkpoints(root)[-1] / "rank_00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 4
    file.write_bytes(data)
    assert "rank_00001" in verify_checkpoint(newest)[0]
    trainer = tiny_trainer(root, token_loader(7), gpt(64), max_steps=4, callbacks=[rank_cases.EMA(0.9)])
    trainer.train()
    assert trainer.resumed_from == list_checkpoints(root)[0]
    file.unlink()
    assert "rank_00001" in verify_checkpoint(newest)[0]


def to_version_2(path: Path) -> None:
    """Rewrites a checkpoint as it was before the trees of ranks listed their tensors themselves."""
    body = json.loads((path / "manifest.json").read_bytes())["manifest"]
    body["version"] = 2
    for name, entry in body["trees"].items():
        file = path / f"{name}.json"
        structure = json.loads(file.read_bytes())
        if name.startswith("rank_"):
            entry["tensors"], structure = structure["tensors"], structure["tree"]
        text = re.sub(r',"rows":\d+', "", json.dumps(structure, separators=(",", ":"))).encode()
        file.write_bytes(text)
        entry["files"][file.name] = {"size": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    text = json.dumps(body, separators=(",", ":")).encode()
    digest = hashlib.sha256(text).hexdigest().encode()
    (path / "manifest.json").write_bytes(b'{"sha256":"%s","manifest":%s}\n' % (digest, text))


def test_a_checkpoint_of_the_format_before_still_loads(written: Path, tmp_path: Path) -> None:
    newest = list_checkpoints(written / "straight-fsdp")[-1]
    old = shutil.copytree(newest, tmp_path / newest.name)
    to_version_2(old)
    assert verify_checkpoint(old) == [] and "rows" not in (old / "model.json").read_text()
    wanted, got = load_checkpoint(newest), load_checkpoint(old)
    assert first_difference(wanted, got) == "" and wanted["model"]
    pieces = load_checkpoint(old, ["model"], whole=False)["model"]
    assert all(pieces[name].whole().equal(tensor) for name, tensor in wanted["model"].items())


def test_a_checkpoint_that_lacks_a_part_of_a_tensor_says_so() -> None:
    half = Pieces(torch.Size([4, 2]), torch.float32, lambda box: [((0, 0), torch.ones(2, 2))])
    with pytest.raises(ValueError, match="4 of 8 elements"):
        half.whole()
    assert half.cut((1, 0), (1, 2)).equal(torch.ones(1, 2))
