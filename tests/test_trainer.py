"""The Trainer: runs from its keyword form, resumes bit for bit from any micro-step, refuses what does not fit."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import (
    BATCH,
    LENGTH,
    Bigram,
    copy_of,
    one_thread,  # noqa: F401
    plain_loader,
    tiny_gpt,
    tiny_trainer,
    token_loader,
    tokens,
)
from torch import nn

from fasttrain.assembly import build_optimizer
from fasttrain.callbacks import Callback, SampleText, read_records
from fasttrain.checkpointing import read_manifest
from fasttrain.config import TrainConfig
from fasttrain.losses import batch_loss
from fasttrain.tokenization import ByteTokenizer
from fasttrain.trainer import Trainer
from fasttrain.verification import first_difference


def signalling_loss(at: set[int]) -> Any:
    """batch_loss that sends this process a real SIGTERM during its n-th calls (counted from 1)."""
    calls = 0

    def loss(model: nn.Module, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls in at:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch_loss(model, batch)

    return loss


def final_trees(trainer: Trainer) -> Any:
    assert trainer.state is not None
    return copy_of(trainer.state.capture())


def train_records(directory: Path) -> list[dict[str, Any]]:
    timeless = ("step", "loss", "lr", "grad_norm", "tokens", "epoch", "nonfinite")
    return [{key: record[key] for key in timeless}
            for record in read_records(directory / "metrics.jsonl") if record["kind"] == "train"]


def test_the_keyword_form_of_the_readme_trains_and_generates(tmp_path: Path) -> None:
    model, train, val = tiny_gpt(), token_loader(), token_loader(2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=6)
    tokenizer = ByteTokenizer()
    trainer = Trainer(model=model, train_dataloader=train, val_dataloader=val, optimizer=optimizer, scheduler=scheduler,
                      config=TrainConfig(max_steps=6), checkpoint_dir=tmp_path / "checkpoints", use_amp=True)
    result = trainer.train()
    assert (result.status, result.step) == ("completed", 6)
    assert result.tokens_seen == 6 * BATCH * LENGTH
    assert result.checkpoint is not None and result.checkpoint.is_dir()
    assert result.val_loss == trainer.evaluate().loss
    assert optimizer.param_groups[0]["lr"] < 1e-9  # the user's scheduler was driven to its end
    assert sum(result.time_by_phase.values()) == pytest.approx(result.seconds)
    with pytest.raises(ValueError, match="tokenizer"):
        trainer.generate_text(prompt="Once upon a time", max_new_tokens=3, temperature=0.8)
    wide = Trainer(model=Bigram(tokenizer.vocab_size), tokenizer=tokenizer)
    assert isinstance(wide.generate_text(prompt="Once upon a time", max_new_tokens=3, temperature=0.8), str)
    assert len(wide.generate_text(["a", "b"], max_new_tokens=3)) == 2


@pytest.mark.parametrize("accum", [1, 3])
@pytest.mark.parametrize("make_loader", [token_loader, plain_loader])
def test_a_run_stopped_at_any_micro_step_ends_bit_for_bit_as_if_it_had_not_been(
        tmp_path: Path, make_loader: Any, accum: int) -> None:
    """Two epochs of 5 batches: with accum=3 windows run across the epoch's end and the last one is short."""
    settings = {"max_steps": 0, "max_epochs": 2, "grad_accum_steps": accum, "warmup_steps": 2}
    straight = tiny_trainer(tmp_path / "straight", make_loader(), **settings)
    assert straight.train().status == "completed"
    expected, expected_records = final_trees(straight), train_records(tmp_path / "straight")
    assert expected["training"]["counters"]["step"] == math.ceil(10 / accum)

    for stop in range(1, 11):
        directory = tmp_path / f"stopped-{stop}"
        first = tiny_trainer(directory, make_loader(), loss_fn=signalling_loss({stop}), **settings)
        assert first.train().status == "interrupted"
        assert first.state is not None and first.state.window.micro_step == stop % accum  # not one micro-batch more
        torch.manual_seed(stop)  # whatever the new process does before: nothing of it may count
        second = tiny_trainer(directory, make_loader(), tiny_gpt(seed=stop + 1), **settings)
        assert second.train().status == "completed"
        assert second.resumed_from is not None
        assert first_difference(expected, final_trees(second)) == "", f"stopped in micro-step {stop}"
        assert train_records(directory) == expected_records, f"stopped in micro-step {stop}"


@pytest.mark.parametrize("make_loader", [token_loader, plain_loader])
def test_a_chain_of_stops_over_three_epochs_changes_nothing(tmp_path: Path, make_loader: Any) -> None:
    settings = {"max_steps": 0, "max_epochs": 3, "grad_accum_steps": 2}
    straight = tiny_trainer(tmp_path / "straight", make_loader(), **settings)
    straight.train()
    for session in range(20):  # noqa: B007
        trainer = tiny_trainer(tmp_path / "chain", make_loader(), loss_fn=signalling_loss({2}), **settings)
        if trainer.train().status == "completed":
            break
    assert session >= 6
    assert first_difference(final_trees(straight), final_trees(trainer)) == ""


def test_a_signal_during_an_evaluation_loses_neither_the_run_nor_the_evaluation(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 4, "eval_every_steps": 2, "val_dataloader": token_loader(3)}

    def evaluations(directory: Path) -> list[Any]:
        return [(record["step"], record["loss"]) for record in read_records(directory / "metrics.jsonl")
                if record["kind"] == "eval"]

    straight = tiny_trainer(tmp_path / "straight", loss_fn=signalling_loss(set()), **settings)
    straight.train()
    # Two training batches, then the evaluation's: the third call is in its middle.
    first = tiny_trainer(tmp_path / "cut", loss_fn=signalling_loss({3}), **settings).train()
    assert (first.status, first.step, evaluations(tmp_path / "cut")) == ("interrupted", 2, [])
    second = tiny_trainer(tmp_path / "cut", loss_fn=signalling_loss(set()), **settings)
    assert second.train().status == "completed"
    assert evaluations(tmp_path / "cut") == evaluations(tmp_path / "straight")
    assert first_difference(final_trees(straight), final_trees(second)) == ""


def test_intervals_in_tokens_go_on_over_stops_as_if_there_had_been_none(tmp_path: Path) -> None:
    """Every evaluation, record, checkpoint and sample of the straight run, once; a stop at each micro-batch."""
    tokens_per_step = 2 * BATCH * LENGTH
    settings: dict[str, Any] = {
        "max_steps": 7, "grad_accum_steps": 2, "val_dataloader": token_loader(1), "keep_last": 0,
        "every_tokens": {"log": tokens_per_step + 1, "eval": 2 * tokens_per_step, "save": 3 * tokens_per_step - 1}}

    def session(directory: Path, stop: set[int]) -> Any:
        sampler = SampleText("ab", every_tokens=2 * tokens_per_step + 5, max_new_tokens=2)
        trainer = tiny_trainer(directory, loss_fn=signalling_loss(stop), callbacks=[sampler], **settings)
        trainer.tokenizer = _Letters()
        return trainer.train().status

    def happened(directory: Path) -> Any:
        records = read_records(directory / "metrics.jsonl")
        samples = [record["step"] for record in read_records(directory / "samples.jsonl")]
        return [(record["step"], record["kind"]) for record in records if record["kind"] in ("train", "eval")], samples

    session(tmp_path / "straight", set())
    wanted = happened(tmp_path / "straight")
    steps = {kind: [step for step, what in wanted[0] if what == kind] for kind in ("train", "eval")}
    assert steps == {"train": [2, 3, 4, 5, 6, 7], "eval": [2, 4, 6, 7]} and wanted[1] == [3, 5, 7]
    assert [path.name[-1] for path in sorted((tmp_path / "straight").glob("step-*"))] == ["3", "6", "7"]
    sessions = 0
    while session(tmp_path / "chain", {2}) == "interrupted":
        sessions += 1
    assert sessions > 5 and happened(tmp_path / "chain") == wanted


def test_a_run_killed_between_checkpoints_repeats_the_lost_steps_exactly(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def dying(model: nn.Module, batch: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:
            raise Killed
        return batch_loss(model, batch)

    calls: list[int] = []
    straight = tiny_trainer(tmp_path / "straight", save_every_steps=4)
    straight.train()
    with pytest.raises(Killed):
        tiny_trainer(tmp_path / "killed", loss_fn=dying, save_every_steps=4, log_every_steps=1).train()
    assert [record["step"] for record in read_records(tmp_path / "killed" / "metrics.jsonl")][-1] == 5
    again = tiny_trainer(tmp_path / "killed", save_every_steps=4, log_every_steps=1)
    assert again.train().status == "completed"
    assert again.resumed_from is not None and again.resumed_from.name.endswith("4")
    straight_trees, trees = final_trees(straight), final_trees(again)
    assert first_difference(straight_trees["model"], trees["model"]) == ""
    assert [record["step"] for record in train_records(tmp_path / "killed")] == [1, 2, 3, 4, 5, 6]  # no step twice


def test_evaluating_and_sampling_leave_the_training_bit_for_bit_alone(tmp_path: Path) -> None:
    """With preflight, evaluation at every step, generated text and a shuffling validation loader, or without."""
    bare = tiny_trainer(tmp_path / "bare", plain_loader())
    bare.train()
    sampler = SampleText("ab", every_steps=1, max_new_tokens=2)
    model = tiny_gpt()
    busy = tiny_trainer(tmp_path / "busy", plain_loader(), model, callbacks=[sampler], eval_every_steps=1,
                        preflight=True, save_every_steps=1, val_dataloader=plain_loader(2))
    busy.tokenizer = _Letters()
    busy.train()
    samples = read_records(tmp_path / "busy" / "samples.jsonl")
    assert [record["step"] for record in samples] == [1, 2, 3, 4, 5, 6]
    one, other = final_trees(bare), final_trees(busy)
    for tree in ("model", "optimizer", "rng"):
        assert first_difference(one[tree], other[tree]) == ""


class _Letters:
    """A tokenizer whose ids fit the tiny vocabulary."""

    vocab_size, eos_token_id = 29, None

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - ord("a") for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(ord("a") + index) for index in ids)


def test_the_same_seed_gives_the_same_losses_and_another_seed_others(tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        torch.manual_seed(hash(name) % 1000)
        tiny_trainer(tmp_path / name, plain_loader(), tiny_gpt(), seed=seed, log_every_steps=1).train()
    losses = {name: [record["loss"] for record in train_records(tmp_path / name)] for name in ("one", "same", "other")}
    assert losses["one"] == losses["same"] != losses["other"]


def test_a_second_train_call_and_a_finished_run_do_nothing_more(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path)
    first = trainer.train()
    before = final_trees(trainer)
    assert trainer.train().step == first.step
    finished = tiny_trainer(tmp_path, model=tiny_gpt(seed=9))
    assert finished.train().step == first.step
    assert first_difference(before["model"], final_trees(finished)["model"]) == ""


def test_more_steps_in_the_config_continue_a_finished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_trainer(tmp_path, schedule="constant").train()
    longer = tiny_trainer(tmp_path, max_steps=9, schedule="constant", lr=5e-3)
    assert longer.train().step == 9
    output = capsys.readouterr().out
    assert "max_steps: 6 -> 9" in output and "lr: 0.01 -> 0.005" in output
    assert longer.state is not None and longer.state.optimizer.param_groups[0]["lr"] == 5e-3  # the new value is taken


def test_a_longer_schedule_takes_hold_with_the_first_resumed_step(tmp_path: Path) -> None:
    tiny_trainer(tmp_path, schedule="linear", log_every_steps=1).train()
    tiny_trainer(tmp_path, schedule="linear", log_every_steps=1, max_steps=11).train()
    rates = [record["lr"] for record in train_records(tmp_path)]
    assert rates == pytest.approx([1e-2 * (1 - step / 5) for step in range(6)]
                                  + [1e-2 * (1 - step / 10) for step in range(6, 11)])


def test_a_model_that_the_user_compiled_trains_and_its_checkpoints_fit_the_plain_one(tmp_path: Path) -> None:
    compiled = torch.compile(Bigram(), backend="eager")
    trainer = tiny_trainer(tmp_path, model=compiled, val_dataloader=token_loader(1))  # type: ignore[arg-type]
    trained = trainer.train()
    plain = Trainer(Bigram(seed=4), val_dataloader=token_loader(1), config={"precision": "float32"})
    plain.load_checkpoint(tmp_path)
    assert plain.evaluate().loss == pytest.approx(trained.val_loss)
    again = Trainer(torch.compile(Bigram(seed=5), backend="eager"), val_dataloader=token_loader(1),  # type: ignore[arg-type]
                    config={"precision": "float32"})
    again.load_checkpoint(tmp_path)
    assert again.evaluate().loss == plain.evaluate().loss


def test_weight_decay_is_for_matrices_and_every_parameter_is_held_once() -> None:
    model = nn.Sequential(Bigram(), nn.LayerNorm(29))
    optimizer = build_optimizer(model, TrainConfig(weight_decay=0.3, lr=0.02, betas=(0.7, 0.8)))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: decay[id(p)] for name, p in model.named_parameters()} == {
        "0.table.weight": 0.3, "0.head.weight": 0.3, "0.head.bias": 0.0, "1.weight": 0.0, "1.bias": 0.0}
    assert all(group["lr"] == 0.02 and group["betas"] == (0.7, 0.8) for group in optimizer.param_groups)


def test_weights_load_without_data_and_the_full_state_with_it(tmp_path: Path) -> None:
    trained = tiny_trainer(tmp_path)
    trained.train()
    other = Trainer(tiny_gpt(seed=5), checkpoint_dir=tmp_path)
    assert other.load_checkpoint(tmp_path).parent == tmp_path
    for (name, one), two in zip(trained.model.named_parameters(), other.model.parameters()):
        assert torch.equal(one, two), name
    full = tiny_trainer(model=tiny_gpt(seed=6))
    full.load_checkpoint(tmp_path)
    assert full.state is not None and full.state.step == 6


def test_a_part_wrapped_by_torch_compile_keeps_its_names_in_the_checkpoint(tmp_path: Path) -> None:
    wrapped = Bigram()
    wrapped.head = torch.compile(wrapped.head, backend="eager")  # type: ignore[assignment]
    assert "head._orig_mod.weight" in wrapped.state_dict()
    tiny_trainer(tmp_path, model=wrapped, loss_fn=signalling_loss({3}), grad_accum_steps=2).train()
    plain = tiny_trainer(tmp_path, model=Bigram(seed=5), grad_accum_steps=2)
    assert plain.train().status == "completed" and plain.resumed_from is not None
    straight = tiny_trainer(model=Bigram(), grad_accum_steps=2)
    straight.train()
    assert first_difference(final_trees(straight)["model"], final_trees(plain)["model"]) == ""


def test_the_newest_checkpoint_is_passed_over_loudly_if_it_is_damaged(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_trainer(tmp_path, save_every_steps=3).train()
    newest = max(tmp_path.glob("step-*"))
    weights = max(newest.glob("*model*"), key=lambda path: path.stat().st_size)
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    again = tiny_trainer(tmp_path, save_every_steps=3)
    assert again.train().status == "completed"
    assert again.resumed_from is not None and again.resumed_from.name.endswith("3")
    assert newest.name in capsys.readouterr().out


def test_the_newest_two_and_the_best_checkpoint_stay_each_with_its_validation_loss(tmp_path: Path) -> None:
    model = tiny_gpt()
    worse: list[float] = [0.0]

    def drifting(model: nn.Module, batch: Any) -> Any:
        loss_sum, count = batch_loss(model, batch)
        if not model.training:  # the validation loss is best at step 2 and worse from then on
            worse[0] += 1
            return loss_sum * 0 + abs(worse[0] - 2) * count, count
        return loss_sum, count

    tiny_trainer(tmp_path, model=model, loss_fn=drifting, val_dataloader=token_loader(1), eval_every_steps=1,
                 save_every_steps=1, keep_last=2, keep_best=1).train()
    losses = {path.name[-1]: read_manifest(path).metadata["val_loss"] for path in sorted(tmp_path.glob("step-*"))}
    assert losses == {"2": 0.0, "5": 3.0, "6": 4.0}


def test_a_failing_disk_does_not_end_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fasttrain.saver.write_snapshot", full)
    result = tiny_trainer(tmp_path, save_every_steps=2).train()
    assert (result.status, result.step, result.checkpoint) == ("completed", 6, None)
    assert capsys.readouterr().out.count("No space left") == 3


def test_sigterm_in_a_real_process_saves_and_the_same_command_continues(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(f"""
        import sys, time
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from tiny_runs import tiny_trainer
        from fasttrain.callbacks import Callback
        class Slow(Callback):
            def on_step(self, state):
                print("STEP", state.step, flush=True)
                time.sleep(0.02 if len(sys.argv) > 1 else 0)
        result = tiny_trainer({str(tmp_path / "run")!r}, callbacks=[Slow()], max_steps=60).train()
        print("RESULT", result.status, result.step, flush=True)
    """))
    search_path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": search_path}
    command = [sys.executable, str(script)]
    process = subprocess.Popen([*command, "slow"], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("STEP 5"):
            process.send_signal(signal.SIGTERM)
            break
    output = process.stdout.read()
    assert process.wait(timeout=60) == 0
    status, step = output.split("RESULT ")[1].split()[:2]
    assert status == "interrupted" and 5 <= int(step) < 60
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert "RESULT completed 60" in done.stdout, done.stdout + done.stderr
    assert f"STEP {int(step) + 1}\n" in done.stdout and f"STEP {step}\n" not in done.stdout


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    def twice(model: nn.Module, batch: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("not reached")

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        tiny_trainer(tmp_path, loss_fn=twice).train()
    assert signal.getsignal(signal.SIGINT) is handler


def test_verify_resume_holds_here_and_names_what_a_forgetful_model_loses(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, grad_accum_steps=2)
    before = copy_of(dict(trainer.model.state_dict()))
    assert trainer.verify_resume(steps=4).ok
    assert first_difference(before, dict(trainer.model.state_dict())) == ""

    class Forgetful(Bigram):
        calls = 0

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            self.calls += 1  # state that no checkpoint can see
            return super().forward(input_ids) * (1 + 0.1 * self.calls)

    outcome = tiny_trainer(model=Forgetful()).verify_resume()
    assert not outcome.ok and outcome.first_difference.startswith("model.table")


def test_verify_resume_leaves_buffers_alone_that_the_constructor_makes() -> None:
    class WithTable(Bigram):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.tensor(2.0), persistent=False)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return super().forward(input_ids) * self.scale

    assert tiny_trainer(model=WithTable()).verify_resume().ok


def test_verify_resume_notices_what_loading_does_not_bring_back() -> None:
    class Stubborn(Bigram):
        """Its second loading, the one from the checkpoint, misses a parameter that the memory still holds rightly."""

        loadings = 0

        def load_state_dict(self, state: Any, **options: Any) -> Any:  # type: ignore[override]
            self.loadings += 1
            kept = {"head.bias": self.head.bias} if self.loadings == 2 else {}
            return super().load_state_dict({**state, **kept}, **options)

    outcome = tiny_trainer(model=Stubborn()).verify_resume()
    assert not outcome.ok and outcome.first_difference.startswith("model.")


def test_verify_resume_notices_a_loader_that_loses_its_place() -> None:
    class Amnesiac:
        def __init__(self) -> None:
            self.served = 0

        def __iter__(self) -> Any:
            while True:
                self.served += 1
                yield tokens(LENGTH, seed=self.served).view(1, LENGTH)

    outcome = tiny_trainer(loader=Amnesiac()).verify_resume()
    assert not outcome.ok and outcome.first_difference == "batch 0"


def test_verify_batch_math_holds_here_and_names_the_parameter_of_a_wrong_loss() -> None:
    trainer = tiny_trainer()
    assert trainer.verify_batch_math().ok
    assert all(p.grad is None for p in trainer.model.parameters())

    def mean_instead_of_sum(model: nn.Module, batch: Any) -> Any:
        loss_sum, count = batch_loss(model, batch)
        return loss_sum / count, count

    outcome = tiny_trainer(loss_fn=mean_instead_of_sum, model=tiny_gpt(dropout=0.0)).verify_batch_math()
    assert not outcome.ok and outcome.first_difference == next(name for name, _ in tiny_gpt().named_parameters())


def _failing(match: str, **changes: Any) -> Any:
    return pytest.param(match, changes, id=match)


@pytest.mark.parametrize(("match", "changes"), [
    _failing(r"\(tuple_iterator\) yields no batch", loader=iter(())),
    _failing(r"\(list\) yields no batch", loader=[]),
    _failing(r"\(DataLoader\) yields no batch", loader=torch.utils.data.DataLoader([])),
    _failing("no limit", max_steps=0),
    _failing("cannot be derived", max_steps=0, max_seconds=1.0),
    _failing("must be below the run's 6 steps", warmup_steps=6),
    _failing("nor can be read twice", global_batch_size=8, loader=iter([tokens(LENGTH).view(1, LENGTH)])),
    _failing("multiple of the loader's batch of 16 tokens", global_batch_tokens=24),
    _failing("multiple of the loader's batch of 2 sequences", global_batch_size=3),
])
def test_what_cannot_be_trained_is_refused_with_a_reason(match: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=match):
        tiny_trainer(**changes).train()


def test_parts_that_do_not_fit_together_are_refused() -> None:
    model = tiny_gpt()
    other = torch.optim.SGD(tiny_gpt().parameters(), lr=1.0)
    with pytest.raises(ValueError, match=r"does not hold .* 'embed|does not hold"):
        Trainer(model, optimizer=other)
    own = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(ValueError, match="drives another optimizer"):
        Trainer(model, optimizer=own, scheduler=torch.optim.lr_scheduler.ConstantLR(other))
    with pytest.raises(ValueError, match="without the optimizer"):
        Trainer(model, scheduler=torch.optim.lr_scheduler.ConstantLR(own))
    with pytest.raises(ValueError, match="must be a torch"):
        Trainer("gpt2")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="did you mean 'max_steps'"):
        Trainer(model, config={"max_step": 3})
    with pytest.raises(ValueError, match="instance, not the class"):
        Trainer(model, callbacks=[Callback])
    with pytest.raises(ValueError, match="train_dataloader is None"):
        Trainer(model, config={"max_steps": 1}).train()
    with pytest.raises(ValueError, match="drop one of the two"):
        Trainer(model, config={"precision": "bfloat16"}, use_amp=False)
    with pytest.raises(ValueError, match="nothing to train"):
        tiny_trainer(model=model.requires_grad_(False)).train()


def test_a_label_outside_the_vocabulary_is_an_index_error_at_the_first_step() -> None:
    batch = (tokens(LENGTH).view(1, LENGTH), torch.full((1, LENGTH), 29))
    with pytest.raises(IndexError, match="29"):
        tiny_trainer(loader=[batch]).train()


def test_a_checkpoint_of_another_model_is_refused_and_named(tmp_path: Path) -> None:
    tiny_trainer(tmp_path).train()
    with pytest.raises(ValueError, match="another model"):
        tiny_trainer(tmp_path, model=Bigram()).train()
    with pytest.raises(ValueError, match=r"'head.weight' is|belongs to another"):
        Trainer(Bigram(vocab=31)).load_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="not a directory"):
        Trainer(Bigram()).load_checkpoint(tmp_path / "nowhere")


def test_a_fresh_run_in_a_used_directory_is_refused(tmp_path: Path) -> None:
    tiny_trainer(tmp_path).train()
    with pytest.raises(ValueError, match="choose another directory"):
        tiny_trainer(tmp_path).train(resume=False)
    for path in tmp_path.glob("step-*/manifest.json"):
        path.write_text("{}")
    with pytest.raises(ValueError, match="none of which verifies"):
        tiny_trainer(tmp_path).train()


def test_going_back_to_an_older_checkpoint_needs_a_directory_without_newer_ones(tmp_path: Path) -> None:
    tiny_trainer(tmp_path / "one", save_every_steps=3).train()
    older = min((tmp_path / "one").glob("step-*"))
    with pytest.raises(ValueError, match=r"continue at step 3.*holds step-00000006"):
        tiny_trainer(tmp_path / "one").train(resume=older)
    branch = tiny_trainer(tmp_path / "two")
    assert branch.train(resume=older).step == 6
    assert branch.resumed_from == older


def test_hugging_face_models_train_unchanged_and_resume_exactly(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ids = tokens(8 * 16).view(8, 16)
    mask = torch.ones_like(ids)
    mask[0, 9:] = 0
    rows = {"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100), "attention_mask": mask}
    batches = [{key: value[start:start + 4] for key, value in rows.items()} for start in (0, 4)]
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=29, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1))
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=29, n_embd=16, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0))
    for model in (llama, gpt2):
        with torch.no_grad():
            own = model.eval()(**batches[0]).loss
        loss_sum, count = batch_loss(model, batches[0])
        torch.testing.assert_close(loss_sum / count, own)
        trainer = tiny_trainer(tmp_path / type(model).__name__, batches, model, grad_accum_steps=2)
        assert trainer.train().status == "completed"
        assert trainer.verify_resume().ok and trainer.verify_batch_math().ok
    bert = transformers.BertForMaskedLM(transformers.BertConfig(
        vocab_size=29, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))
    with pytest.raises(ValueError, match="not a causal language model"):
        Trainer(bert)


@pytest.mark.parametrize("interval", [{"eval_every_steps": 2}, {"save_every_steps": 2}, {"keep_every_steps": 2},
                                      {"log_every_steps": 7}], ids=str)
def test_an_interval_that_never_fires_is_refused_before_the_first_step(interval: dict[str, int]) -> None:
    trainer = tiny_trainer(max_steps=6, preflight=True, **interval)
    [(name, every)] = interval.items()
    with pytest.raises(ValueError, match=rf"{name}={every} never fires.*"):
        trainer.train()
    assert trainer.state is not None and trainer.state.step == 0


@pytest.mark.parametrize(("changes", "message"), [
    ({"every_tokens": {"eval": 16}}, r"every_tokens\['eval'\]=16 never fires: there is no val_dataloader"),
    ({"every_tokens": {"save": 16}}, r"every_tokens\['save'\]=16 never fires: there is no checkpoint_dir"),
    ({"every_tokens": {"log": 97}}, r"every_tokens\['log'\]=97 never fires: the run has 96 tokens"),
    ({"every_tokens": {"log": 41}, "max_tokens": 40}, r"never fires: the run has 40 tokens")], ids=str)
def test_an_interval_in_tokens_that_never_fires_is_refused_too(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_trainer(max_steps=6, preflight=True, **changes).train()
    tiny_trainer(max_steps=6, preflight=True, every_tokens={"log": 96}).train()


def test_an_interval_that_nobody_chose_may_be_longer_than_the_run() -> None:
    assert tiny_trainer(max_steps=2, log_every_steps=10, preflight=True).train().step == 2


def test_preflight_refuses_a_disk_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = tiny_trainer().preflight()
    assert report.loss == pytest.approx(math.log(29), rel=0.2)
    monkeypatch.setattr("fasttrain.preflight.free_bytes", lambda directory: 1000)
    with pytest.raises(ValueError, match=r"1000 B free"):
        tiny_trainer(tmp_path, preflight=True).train()
    assert not list(tmp_path.glob("step-*"))


def test_preflight_leaves_averages_gradients_generators_and_the_data_position_alone() -> None:
    class Normed(Bigram):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(29)
            self.drop = nn.Dropout(0.5)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.drop(self.norm(super().forward(input_ids).transpose(1, 2)).transpose(1, 2))

    trainer = tiny_trainer(loader=plain_loader(), model=Normed(), val_dataloader=plain_loader(1))
    before, state = final_trees_of(trainer)
    mine = torch.ones_like(trainer.model.head.weight)
    trainer.model.head.weight.grad = mine
    trainer.preflight()
    after, _ = final_trees_of(trainer)
    assert first_difference(before, after) == ""
    assert trainer.model.head.weight.grad is mine and trainer.model.head.bias.grad is None
    assert state.stream.batch == 0


def test_preflight_takes_the_longest_batch_and_times_evaluation_and_a_real_checkpoint(tmp_path: Path) -> None:
    ragged = [tokens(2 * length).view(2, length) for length in (3, 8, 5)]
    trainer = tiny_trainer(tmp_path, ragged, Bigram(), max_steps=100, eval_every_steps=10, save_every_steps=50,
                           val_dataloader={"one": token_loader(2), "two": token_loader(3)})
    (tmp_path / ".preflight-killed").mkdir()
    report = trainer.preflight()
    assert report.longest == (2, 8)
    assert None not in (report.step_seconds, report.eval_seconds, report.save_seconds, report.load_seconds)
    wanted = 100 * report.step_seconds + 11 * report.eval_seconds + 3 * report.save_seconds
    assert report.projected_seconds == pytest.approx(wanted)
    trainer = tiny_trainer(tmp_path, token_loader(), Bigram(), max_steps=100, val_dataloader=token_loader(2),
                           every_tokens={"eval": 10 * BATCH * LENGTH, "save": 50 * BATCH * LENGTH - 1})
    again = trainer.preflight()
    wanted = 100 * again.step_seconds + 11 * again.eval_seconds + 3 * again.save_seconds
    assert again.projected_seconds == pytest.approx(wanted)
    assert list(tmp_path.iterdir()) == []  # nothing is left behind, of a killed one neither


def test_preflight_refuses_a_checkpoint_that_cannot_be_read_back(tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Any) -> Any:
        raise ValueError("tensor 'x' is damaged")

    monkeypatch.setattr("fasttrain.preflight.load_checkpoint", refuse)
    with pytest.raises(ValueError, match="is damaged"):
        tiny_trainer(tmp_path, model=Bigram(), preflight=True).train()
    assert not list(tmp_path.glob("step-*"))


def final_trees_of(trainer: Trainer) -> Any:
    state = trainer._built_state()
    return copy_of(state.capture()), state


def test_the_estimated_checkpoint_size_is_that_of_the_real_one(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, model=Bigram(vocab=4000), loader=token_loader())
    estimate = trainer.preflight().checkpoint_bytes
    checkpoint = trainer.train().checkpoint
    assert checkpoint is not None
    real = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    assert real == pytest.approx(estimate, rel=0.1)


def test_the_startup_report_says_what_runs_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    tiny_trainer(preflight=True).train()
    output = capsys.readouterr().out
    for part in ("precision", "float32: precision='float32' was asked for", "AdamW", "cross-entropy", "first batch",
                 "nothing: a fresh run"):
        assert part in output


def test_metrics_are_valid_json_lines_with_the_run_in_order(tmp_path: Path) -> None:
    tiny_trainer(tmp_path, val_dataloader=token_loader(1), eval_every_steps=3).train()
    kinds = []
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        kinds.append((record["step"], record["kind"]))
    assert kinds == [(2, "train"), (3, "eval"), (4, "train"), (6, "train"), (6, "eval"), (6, "save"), (6, "end")]
