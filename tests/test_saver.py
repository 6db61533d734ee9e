"""Saving behind the training: the file is the snapshot, no error is lost, nothing goes before the newer one is safe."""

from __future__ import annotations

import errno
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import one_thread, plain_loader, tiny_gpt, tiny_trainer, tokens  # noqa: F401
from torch import nn

from fasttrain import saver as saver_module
from fasttrain.callbacks import Callback
from fasttrain.checkpointing import (
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    read_manifest,
    save_checkpoint,
    snapshot_trees,
    verify_checkpoint,
)
from fasttrain.config import TrainConfig
from fasttrain.losses import batch_loss
from fasttrain.saver import Arena, CheckpointSaver
from fasttrain.storage import serialized


class Gate:
    """Holds every background write back until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.reached = threading.Event(), threading.Event()
        real = saver_module.write_snapshot

        def write(*args: Any, **options: Any) -> Path:
            self.reached.set()
            assert self.open.wait(30)
            return real(*args, **options)

        monkeypatch.setattr(saver_module, "write_snapshot", write)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made = Gate(monkeypatch)
    yield made
    made.open.set()


def failing_writes(monkeypatch: pytest.MonkeyPatch, error: Callable[[int], BaseException | None]) -> list[int]:
    """write_snapshot raises error(n) at its n-th call, if that gives one; the list grows by the calls' steps."""
    calls: list[int] = []
    real = saver_module.write_snapshot

    def write(root: Path, step: int, *args: Any, **options: Any) -> Path:
        calls.append(step)
        problem = error(len(calls))
        if problem is not None:
            raise problem
        return real(root, step, *args, **options)

    monkeypatch.setattr(saver_module, "write_snapshot", write)
    return calls


def trees_of(mark: float) -> dict[str, Any]:
    return {"model": {"w": torch.full((1000,), mark), "h": torch.full((3, 5), mark).to(torch.bfloat16)},
            "training": {"mark": mark, "list": [1, 2]}}


def test_what_changes_after_save_does_not_reach_the_file(tmp_path: Path, gate: Gate) -> None:
    trees = trees_of(1.0)
    saver = CheckpointSaver(tmp_path, TrainConfig())
    saver.save(1, trees, {"config": {}})
    assert gate.reached.wait(10)
    trees["model"]["w"].fill_(9.0)
    trees["model"]["h"].zero_()
    trees["training"]["list"].append(3)
    assert not saver.collect() and list_checkpoints(tmp_path) == []
    gate.open.set()
    assert saver.collect(wait=True) and saver.newest == tmp_path / "step-00000001"
    loaded = load_checkpoint(saver.newest)
    assert loaded["model"]["w"].eq(1).all() and loaded["model"]["h"].eq(1).all()
    assert loaded["training"]["list"] == [1, 2]


def test_a_second_save_waits_for_the_first_and_both_are_whole(tmp_path: Path) -> None:
    """Interleavings at random: weights change all the time, the snapshot's memory is used again and again."""
    chance, weights = random.Random(0), torch.zeros(300_000)
    saver = CheckpointSaver(tmp_path, TrainConfig(keep_last=3))
    for step in range(60):
        saver.save(step, {"model": {"w": weights, "n": torch.tensor(step)}}, {"mark": step})
        for _ in range(chance.randrange(4)):
            weights += 1
        weights.fill_(step + 1)
        if chance.random() < 0.5:
            saver.collect()
    saver.collect(wait=True)
    paths = list_checkpoints(tmp_path)
    assert [read_manifest(path).step for path in paths] == [57, 58, 59]
    for path in paths:
        step = read_manifest(path).step
        assert load_checkpoint(path)["model"]["w"].unique().tolist() == [step]


def test_nothing_is_removed_while_the_newer_one_is_in_flight(tmp_path: Path, gate: Gate) -> None:
    gate.open.set()
    saver = CheckpointSaver(tmp_path, TrainConfig(keep_last=1, keep_best=0))
    saver.save(1, trees_of(1.0), {}, wait=True)
    gate.open.clear()
    gate.reached.clear()
    saver.save(2, trees_of(2.0), {})
    assert gate.reached.wait(10)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000001"]
    gate.open.set()
    saver.collect(wait=True)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000002"]


def test_a_file_that_reads_back_otherwise_costs_no_older_checkpoint(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    saver = CheckpointSaver(tmp_path, TrainConfig(keep_last=1, keep_best=0), log=lines.append)
    saver.save(1, trees_of(1.0), {}, wait=True)
    real = saver_module.write_snapshot

    def rotten(*args: Any, **options: Any) -> Path:
        path = real(*args, **options)
        data = bytearray((path / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (path / "model.safetensors").write_bytes(data)
        return path

    monkeypatch.setattr(saver_module, "write_snapshot", rotten)
    saver.save(2, trees_of(2.0), {}, wait=True)
    assert saver.failures == 1 and "reads back otherwise" in lines[0] and "tensor 'h'" in lines[0]
    found = latest_checkpoint(tmp_path, log=lines.append)
    assert found is not None and found.name == "step-00000001"


def test_a_disk_error_is_told_at_the_next_step_and_the_next_interval_tries_again(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls = failing_writes(monkeypatch, lambda n: OSError(errno.EIO, "Input/output error", "model.safetensors")
                           if n == 1 else None)
    seen: list[tuple[int, str]] = []

    class Watcher(Callback):
        def on_step(self, state: Any) -> None:
            seen.append((state.step, capsys.readouterr().out))

    result = tiny_trainer(tmp_path, callbacks=[Watcher()], save_every_steps=2).train()
    output = "".join(text for _, text in seen) + capsys.readouterr().out
    assert calls == [2, 4, 6] and (result.status, result.step) == ("completed", 6)
    assert output.count("could not be saved") == 1 and "step 2 could not be saved (1 in a row)" in output
    assert "model.safetensors" in output and "needed" in output and "free" in output
    assert result.checkpoint is not None and verify_checkpoint(result.checkpoint) == []
    assert not list(tmp_path.glob(".inflight*"))


def test_after_so_many_failures_in_a_row_the_run_stops_if_asked_to(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing_writes(monkeypatch, lambda n: OSError(errno.ENOSPC, "No space left on device") if n != 2 else None)
    result = tiny_trainer(tmp_path, max_steps=50, save_every_steps=2, max_save_failures=2).train()
    assert result.status == "stopped" and 8 <= result.step <= 11 and "max_save_failures=2" in result.reason


def test_any_other_error_of_the_writer_ends_the_run_at_the_next_step(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing_writes(monkeypatch, lambda n: RuntimeError("a bug"))
    trainer = tiny_trainer(tmp_path, max_steps=50, save_every_steps=2)
    with pytest.raises(RuntimeError, match="a bug"):
        trainer.train()
    assert trainer.state is not None and trainer.state.step <= 4


def test_state_that_is_no_plain_data_is_refused_where_it_is_saved_and_named(tmp_path: Path) -> None:
    class Rich(Callback):
        def on_step(self, state: Any) -> None: ...

        def state_dict(self) -> dict[str, Any]:
            return {"model": nn.Linear(1, 1)}

    with pytest.raises(TypeError, match=r"training\['callbacks'\]\[0\]\[1\]\['model'\] is a torch.nn"):
        tiny_trainer(tmp_path, callbacks=[Rich()]).train()
    assert list_checkpoints(tmp_path) == []


def test_the_end_of_the_data_waits_for_the_save_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last step was saved behind the training, like any other: only the next fetch told that there is no more."""
    real = saver_module.write_snapshot

    def slow(*args: Any, **options: Any) -> Path:
        time.sleep(0.3)
        return real(*args, **options)

    monkeypatch.setattr(saver_module, "write_snapshot", slow)
    x = tokens(5 * 16).view(5, 2, 8)
    trainer = tiny_trainer(tmp_path, [(batch, batch) for batch in x], max_steps=0, max_epochs=1, save_every_steps=1)
    result = trainer.train()
    assert result.step == 5 and result.checkpoint == tmp_path / "step-00000005" == list_checkpoints(tmp_path)[-1]
    assert verify_checkpoint(result.checkpoint) == []


def test_an_exception_waits_for_the_save_that_runs(tmp_path: Path, gate: Gate) -> None:
    calls: list[int] = []

    def failing(model: nn.Module, batch: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            assert gate.reached.wait(10)  # on a busy core the writer may not have come that far
            threading.Timer(0.1, gate.open.set).start()
            raise RuntimeError("the model broke")
        return batch_loss(model, batch)

    with pytest.raises(RuntimeError, match="the model broke"):
        tiny_trainer(tmp_path, loss_fn=failing, max_steps=10_000, save_every_steps=1).train()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000001"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_waits_for_the_save_that_runs_and_saves_its_own_step(
        tmp_path: Path, gate: Gate, number: signal.Signals) -> None:
    def signal_and_open() -> None:
        gate.reached.wait(10)
        os.kill(os.getpid(), number)
        time.sleep(0.05)
        gate.open.set()

    threading.Thread(target=signal_and_open).start()
    result = tiny_trainer(tmp_path, max_steps=10_000, save_every_steps=1).train()
    assert (result.status, result.exit_code) == ("interrupted", 128 + number)
    assert result.checkpoint == tmp_path / f"step-{result.step:08d}" and verify_checkpoint(result.checkpoint) == []


def test_a_second_signal_leaves_at_once_and_harms_nothing(tmp_path: Path, gate: Gate) -> None:
    """The writer stands at its gate, and the loop waits for it before it saves the next step."""
    def signal_twice() -> None:
        gate.reached.wait(10)
        for _ in range(2):
            time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=signal_twice).start()
    with pytest.raises(KeyboardInterrupt):
        tiny_trainer(tmp_path, max_steps=10_000, save_every_steps=1).train()
    assert not gate.open.is_set() and list_checkpoints(tmp_path) == []
    gate.open.set()
    assert tiny_trainer(tmp_path, max_steps=2).train().status == "completed"  # the next run is free to start


def test_weights_that_are_not_finite_never_displace_finite_ones(tmp_path: Path) -> None:
    saver = CheckpointSaver(tmp_path, TrainConfig(keep_last=1, keep_best=0))
    saver.save(1, trees_of(1.0), {}, wait=True)
    for step in (2, 3, 4):
        saver.save(step, trees_of(float("nan")), {"val_loss": 0.5}, wait=True)
    assert [read_manifest(path).step for path in list_checkpoints(tmp_path)] == [1, 4]
    assert read_manifest(tmp_path / "step-00000004").metadata["finite"] is False
    huge = torch.full((100,), 3e38)  # finite, but its sum is not
    saver.save(5, {"model": {"w": huge}}, {}, wait=True)
    assert read_manifest(tmp_path / "step-00000005").metadata["finite"] is True


def test_every_t_th_the_last_and_the_best_are_classes_of_their_own(tmp_path: Path) -> None:
    saver = CheckpointSaver(tmp_path, TrainConfig(keep_last=2, keep_best=1, keep_every_steps=4))
    for step in range(1, 12):
        saver.save(step, trees_of(1.0), {"val_loss": abs(step - 5) + 1.0}, wait=True)
    assert [read_manifest(path).step for path in list_checkpoints(tmp_path)] == [4, 5, 8, 10, 11]


def test_without_memory_for_a_copy_the_step_waits_and_is_told_why(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saver_module, "available_memory_bytes", lambda: 1000)
    lines: list[str] = []
    saver = CheckpointSaver(tmp_path, TrainConfig(), log=lines.append)
    for step in (1, 2):
        saver.save(step, trees_of(1.0), {})
        assert saver.newest == tmp_path / f"step-{step:08d}"
    assert len(lines) == 1 and "without a copy" in lines[0]


def test_a_snapshots_memory_is_used_again_and_grows(tmp_path: Path) -> None:
    arena = Arena()
    small = arena.copy(snapshot_trees({"model": {"w": torch.ones(10)}}))
    place = small.trees["model"][1]["w"].data_ptr()
    assert arena.copy(snapshot_trees({"model": {"w": torch.zeros(10)}})).trees["model"][1]["w"].data_ptr() == place
    table = {"w": torch.ones(5000), "e": torch.empty(0, 3), "b": torch.tensor(True)}
    big = arena.copy(snapshot_trees({"model": table}))
    assert big.trees["model"][1]["w"].eq(1).all() and big.trees["model"][1]["e"].shape == (0, 3)


def test_a_large_state_is_written_by_several_threads_and_is_the_same_bytes(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trees = {name: {"w": torch.randn(300_000)} for name in ("model", "optimizer", "extra")}
    one = save_checkpoint(tmp_path / "one", 1, trees, metadata={})
    monkeypatch.setattr("fasttrain.treefiles.PARALLEL_BYTES", 0)
    many = save_checkpoint(tmp_path / "many", 1, trees, metadata={})
    assert verify_checkpoint(many) == []
    for file in one.iterdir():
        assert file.read_bytes() == (many / file.name).read_bytes()
    write = os.write

    def refuse(descriptor: int, data: Any) -> int:
        if len(data) > 100_000:  # a tensor's, on its file's own thread
            raise OSError(errno.ENOSPC, "full")
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", refuse)
    with pytest.raises(OSError, match="no room"):
        save_checkpoint(tmp_path / "many", 2, trees, metadata={})
    assert os.listdir(tmp_path / "many") == ["step-00000001"]


def test_a_worker_forked_during_a_rename_does_not_keep_the_lock(tmp_path: Path) -> None:
    with serialized(tmp_path):
        pid = os.fork()
        if pid == 0:
            signal.pause()
    try:
        taken = threading.Thread(target=lambda: serialized(tmp_path).__enter__(), daemon=True)
        taken.start()
        taken.join(5)
        assert not taken.is_alive()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_a_second_trainer_on_the_directory_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    messages: list[str] = []

    class Rival(Callback):
        def on_step(self, state: Any) -> None:
            if state.step == 2:
                with pytest.raises(RuntimeError) as caught:
                    tiny_trainer(tmp_path).train()
                messages.append(str(caught.value))

    assert tiny_trainer(tmp_path, callbacks=[Rival()]).train().status == "completed"
    assert len(messages) == 1 and "in use by this process" in messages[0]
