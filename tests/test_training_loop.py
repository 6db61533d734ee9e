"""The loop: exact batch maths, a verdict before the update, one clock, no reading of the device between logs."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_runs import (
    BATCH,
    LENGTH,
    VOCAB,
    Bigram,
    copy_of,
    one_thread,  # noqa: F401
    plain_loader,
    tiny_gpt,
    tiny_trainer,
    token_loader,
    tokens,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from fasttrain.batch_stream import BatchStream, peek_batches
from fasttrain.callbacks import Callback, Hooks
from fasttrain.config import TrainConfig
from fasttrain.evaluation import EvalResult
from fasttrain.losses import IGNORE
from fasttrain.ops.adamw import AdamW
from fasttrain.schedules import build_scheduler, lr_factor
from fasttrain.state import TrainState
from fasttrain.training_loop import Parts, fit
from fasttrain.utils import PhaseClock
from fasttrain.verification import first_difference

X = tokens(12 * LENGTH).view(12, LENGTH)
Y = torch.where(tokens(12 * LENGTH, seed=1).view(12, LENGTH) < 12, IGNORE, tokens(12 * LENGTH, seed=2).view(12, LENGTH))


def make_state(batches: Any, model: nn.Module | None = None, optimizer: Any = None, *, max_epochs: int = 0,
               scheduler: Any = None) -> TrainState:
    model = model or Bigram()
    optimizer = optimizer(model) if optimizer else AdamW(model.parameters(), lr=1e-2)
    return TrainState(model, optimizer, BatchStream(batches, max_epochs=max_epochs),
                      scheduler(optimizer) if scheduler else None)


def weights(state: TrainState) -> Any:
    return copy_of(dict(state.model.state_dict()))


def sgd(model: nn.Module) -> Any:
    """Its step is the gradient itself."""
    return torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize("optimizer", [None, sgd])
@pytest.mark.parametrize("sizes", [(12,), (6, 6), (1,) * 12, (5, 1, 6), (7, 3, 2)])
def test_micro_batches_of_any_size_give_the_step_of_the_whole_batch(sizes: tuple[int, ...], optimizer: Any) -> None:
    """Ragged targets: a mean of means would weigh a row with two targets like one with eight."""
    bounds = [0, *itertools.accumulate(sizes)]
    pieces = [(X[a:b], Y[a:b]) for a, b in itertools.pairwise(bounds)]
    whole, split = make_state([(X, Y)], optimizer=optimizer), make_state(pieces, optimizer=optimizer)
    for state, accum in ((whole, 1), (split, len(pieces))):
        fit(state, TrainConfig(max_steps=3, grad_accum_steps=accum))
    for (name, one), other in zip(whole.model.named_parameters(), split.model.parameters()):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    assert whole.counters.tokens_seen == split.counters.tokens_seen == 3 * int((Y != IGNORE).sum())


def test_a_step_is_the_gradient_of_the_mean_over_targets() -> None:
    model = Bigram()
    state = make_state([(X[:5], Y[:5]), (X[5:], Y[5:])], model, sgd)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    expected = torch.autograd.grad(F.cross_entropy(model(X).flatten(0, 1), Y.flatten()), list(model.parameters()))
    fit(state, TrainConfig(max_steps=1, grad_accum_steps=2, max_grad_norm=0.0))
    for (name, p), gradient in zip(model.named_parameters(), expected):
        torch.testing.assert_close(p.detach(), before[name] - 0.1 * gradient, rtol=1e-5, atol=1e-7)
    norm = float(torch.cat([gradient.flatten() for gradient in expected]).norm())
    assert state.counters.last_grad_norm == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("optimizer", [None, sgd])
def test_gradients_are_clipped_to_the_global_norm_of_the_mean(optimizer: Any) -> None:
    model = Bigram()
    optimizers = {None: AdamW, sgd: None}
    state = make_state([(X, Y)], model, optimizer)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    fit(state, TrainConfig(max_steps=1, max_grad_norm=0.01))
    if optimizers[optimizer] is None:
        moved = torch.cat([(p.detach() - before[name]).flatten() for name, p in model.named_parameters()])
        assert float(moved.norm()) == pytest.approx(0.1 * 0.01, rel=1e-3)
    else:
        moments = torch.cat([entry["exp_avg"].flatten() for entry in state.optimizer.state.values()])
        assert float(moments.norm()) == pytest.approx(0.1 * 0.01, rel=1e-3)
    assert state.counters.last_grad_norm > 0.1  # shown as it was before clipping


def test_the_last_window_may_be_short_and_is_still_exact() -> None:
    pieces = [(X[:4], Y[:4]), (X[4:8], Y[4:8]), (X[8:], Y[8:])]
    state = make_state(pieces, optimizer=sgd, max_epochs=1)
    assert fit(state, TrainConfig(max_epochs=1, grad_accum_steps=2)) == "completed"
    other = make_state([(X[:8], Y[:8]), (X[8:], Y[8:])], optimizer=sgd, max_epochs=1)
    fit(other, TrainConfig(max_epochs=1))
    assert state.step == other.step == 2
    for one, two in zip(state.model.parameters(), other.model.parameters()):
        torch.testing.assert_close(one, two)


class Poisoned(Bigram):
    """Its loss is not finite for a batch that starts with token 0."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, input_ids: Tensor) -> Tensor:
        logits = super().forward(input_ids)
        if int(input_ids[0, 0]) != 0:
            return logits
        if self.how == "loss":
            return logits * float("nan")
        return logits + (logits.detach() * 0).masked_fill(logits == logits, 0) + _NanGradient.apply(logits)


class _NanGradient(torch.autograd.Function):
    """0 forward, NaN backward: a finite loss with a non-finite gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * float("nan")


def batch(first: int) -> tuple[Tensor, Tensor]:
    x = X[:BATCH].clone()
    x[0, 0] = first
    return x, X[BATCH: 2 * BATCH]


@pytest.mark.parametrize("how", ["loss", "gradient"])
@pytest.mark.parametrize("optimizer", [None, sgd, lambda model: torch.optim.AdamW(model.parameters())])
def test_a_non_finite_step_leaves_every_bit_alone_and_is_counted(how: str, optimizer: Any) -> None:
    """good, bad, good: the same weights, moments and learning rate as good, good."""
    records: list[Any] = []
    seen: list[int] = []

    class Watch(Callback):
        def on_log(self, state: TrainState, record: Any) -> None:
            records.append(record)

        def on_nonfinite(self, state: TrainState) -> None:
            seen.append(state.step)

    def decaying(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

    state = make_state([batch(1), batch(0), batch(2)], Poisoned(how), optimizer, scheduler=decaying)
    fit(state, TrainConfig(max_steps=3, log_every_steps=3), Parts(hooks=Hooks([Watch()])))
    clean = make_state([batch(1), batch(2)], Poisoned(how), optimizer, scheduler=decaying)
    fit(clean, TrainConfig(max_steps=2))
    assert first_difference(weights(clean), weights(state)) == ""
    assert first_difference(clean.optimizer.state_dict(), state.optimizer.state_dict()) == ""
    assert clean.optimizer.param_groups[0]["lr"] == state.optimizer.param_groups[0]["lr"]
    assert seen == [2] and state.counters.nonfinite_steps == 1 and records[0]["nonfinite"] == 1
    assert math.isfinite(records[0]["loss"])  # over the steps that were trained on; the count stands beside it


@pytest.mark.parametrize("optimizer", [None, sgd])
def test_a_verdict_that_comes_one_step_late_changes_no_bit(monkeypatch: pytest.MonkeyPatch, optimizer: Any) -> None:
    """As on a GPU, where the host reads a step's numbers only once the next step's work is queued."""
    def decaying(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

    outcomes = []
    for host_devices in (("cpu",), ()):
        monkeypatch.setattr("fasttrain.utils._HOST_DEVICES", host_devices)
        lag: list[bool] = []

        class Watch(Callback):
            def on_step(self, state: TrainState) -> None:
                lag.append(state.pending is not None)  # noqa: B023

        nothing = (X[:2], torch.full_like(X[:2], IGNORE))
        state = make_state([batch(1), batch(0), nothing, batch(2)], Poisoned("loss"), optimizer, scheduler=decaying)
        fit(state, TrainConfig(max_tokens=9 * BATCH * LENGTH, log_every_steps=3), Parts(hooks=Hooks([Watch()])))
        assert any(lag) == (not host_devices)
        outcomes.append(copy_of({"weights": dict(state.model.state_dict()), "optimizer": state.optimizer.state_dict(),
                                 "scheduler": state.scheduler.state_dict(), "counters": vars(state.counters)}))
    for part in outcomes[0]:
        if part == "weights":  # the clip factor is computed in float64 on the host and float32 on the device
            for one, other in zip(outcomes[0][part].values(), outcomes[1][part].values()):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
        elif part == "scheduler":
            assert outcomes[0][part]["last_epoch"] == outcomes[1][part]["last_epoch"]
    for name in ("step", "tokens_seen", "nonfinite_steps", "empty_steps", "last_lr"):
        assert outcomes[0]["counters"][name] == outcomes[1]["counters"][name]


def test_one_bad_micro_batch_discards_its_whole_window() -> None:
    state = make_state([batch(1), batch(0)], Poisoned("loss"))
    before = weights(state)
    fit(state, TrainConfig(max_steps=1, grad_accum_steps=2))
    assert first_difference(before, weights(state)) == "" and math.isnan(state.counters.train_loss)


def test_the_policy_stop_ends_the_run_with_the_reason() -> None:
    state = make_state([batch(1), batch(0), batch(2)], Poisoned("loss"))
    assert fit(state, TrainConfig(max_steps=9, nonfinite="stop")) == "stopped"
    assert state.step == 2 and "step 2" in state.stop_reason


def test_nothing_but_non_finite_steps_ends_the_run() -> None:
    state = make_state([batch(0)], Poisoned("loss"))
    assert fit(state, TrainConfig(max_steps=10**6)) == "stopped"
    assert state.step == 100


def test_only_non_finite_steps_without_a_good_one_between_are_in_a_row() -> None:
    state = make_state([batch(0), batch(1)], Poisoned("loss"))
    assert fit(state, TrainConfig(max_steps=6, max_nonfinite_in_a_row=2)) == "completed"
    assert (state.step, state.counters.nonfinite_steps) == (6, 3)


def test_a_model_left_in_eval_mode_is_trained_in_training_mode() -> None:
    """As `from_pretrained` leaves it."""
    modes: list[bool] = []

    class Watched(Bigram):
        def forward(self, input_ids: Tensor) -> Tensor:
            modes.append(self.training)
            return super().forward(input_ids)

    fit(make_state([(X, Y)], Watched().eval()), TrainConfig(max_steps=2))
    assert modes == [True, True]


@pytest.mark.parametrize("optimizer", [None, sgd])
def test_a_step_without_targets_changes_nothing_and_is_counted(optimizer: Any) -> None:
    empty: list[bool] = []

    class Watch(Callback):
        def on_step(self, state: TrainState) -> None:
            empty.append(state.counters.last_was_empty)

    nothing = (X, torch.full_like(Y, IGNORE))
    state = make_state([(X, Y), nothing, (X, Y)], optimizer=optimizer)
    fit(state, TrainConfig(max_steps=3), Parts(hooks=Hooks([Watch()])))
    assert empty == [False, True, False]
    clean = make_state([(X, Y)], optimizer=optimizer)
    fit(clean, TrainConfig(max_steps=2))
    assert first_difference(weights(clean), weights(state)) == ""
    assert (state.counters.empty_steps, state.counters.nonfinite_steps) == (1, 0)


class ScalarReads(TorchDispatchMode):
    """Counts the reads of a device value by the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_the_host_reads_no_device_value_between_logs() -> None:
    state = make_state([(X, Y)] * 3, tiny_gpt())
    fit(state, TrainConfig(max_steps=1))
    with ScalarReads() as reads:
        fit(state, TrainConfig(max_steps=11, grad_accum_steps=2, log_every_steps=100))
    assert state.step == 11 and reads.count == 0
    with ScalarReads() as reads:
        X.sum().item()
    assert reads.count == 1  # the counter works


@pytest.mark.parametrize(("limits", "steps"), [
    ({"max_steps": 4}, 4), ({"max_epochs": 2}, 6), ({"max_tokens": 5 * BATCH * LENGTH}, 5),
    ({"max_tokens": 5 * BATCH * LENGTH + 1}, 6), ({"max_steps": 9, "max_tokens": BATCH * LENGTH}, 1)])
def test_a_run_ends_at_the_first_limit(limits: Any, steps: int) -> None:
    state = make_state(token_loader(3), max_epochs=limits.get("max_epochs", 0))
    assert fit(state, TrainConfig(**limits)) == "completed"
    assert state.step == steps and state.counters.tokens_seen == steps * BATCH * LENGTH


def test_seconds_are_a_limit_too() -> None:
    state = make_state(token_loader(3))
    assert fit(state, TrainConfig(max_seconds=0.05)) == "completed"
    assert state.step >= 1


def test_phases_come_in_one_order_and_on_one_clock() -> None:
    events: list[str] = []

    class Watch(Callback):
        def on_step(self, state: TrainState) -> None:
            events.append(f"step {state.step}")

        def on_log(self, state: TrainState, record: Any) -> None:
            events.append("log")

        def on_eval_start(self, state: TrainState) -> None:
            events.append("eval start")

        def on_eval(self, state: TrainState, result: Any) -> None:
            events.append("eval")
            if state.step == 4:
                state.request_stop("enough")

    def evaluate() -> EvalResult:
        return EvalResult(1.0 / state.step, 1.0, None, None, 1)

    state = make_state(token_loader(3))
    config = TrainConfig(max_steps=9, grad_accum_steps=3, log_every_steps=2, eval_every_steps=2, save_every_steps=2)
    status = fit(state, config, Parts(hooks=Hooks([Watch()]), evaluate=evaluate, save=lambda: events.append("save")))
    assert status == "stopped" and state.stop_reason == "enough"
    assert events == ["step 1", "step 2", "log", "eval start", "eval", "save",
                      "step 3", "step 4", "log", "eval start", "eval", "save"]
    assert (state.counters.best_step, state.counters.best_val_loss) == (4, 0.25)


def test_every_second_is_booked_under_what_it_was_spent_on() -> None:
    marks: list[str] = []

    class Recorder(PhaseClock):
        def mark(self, phase: str) -> None:
            marks.append(phase)
            super().mark(phase)

    config = TrainConfig(max_steps=2, grad_accum_steps=2, log_every_steps=1, eval_every_steps=1, save_every_steps=1)
    fit(make_state(token_loader(3)), config, Parts(
        clock=Recorder(), evaluate=lambda: EvalResult(1.0, 1.0, None, None, 1), save=lambda: None))
    micro_step = ["other", "data", "transfer", "forward_backward"]
    step = [*micro_step, *micro_step, "optimizer", "log", "other", "eval", "log", "other", "save"]
    assert marks == [*step, *step, "other"]


def test_the_best_of_equal_evaluations_is_the_first() -> None:
    state = make_state(token_loader(3))
    fit(state, TrainConfig(max_steps=3, eval_every_steps=1), Parts(
        evaluate=lambda: EvalResult(1.0, 1.0, None, None, 1)))
    assert (state.counters.best_step, state.counters.last_eval_step) == (1, 3)


@pytest.mark.parametrize("host_devices", [("cpu",), ()], ids=["at once", "one step late"])
def test_intervals_in_tokens_fire_at_the_first_step_that_passes_a_multiple(
        monkeypatch: pytest.MonkeyPatch, host_devices: tuple[str, ...]) -> None:
    """Ragged targets, one step that passes two multiples, one that hits a multiple exactly, one without a target."""
    monkeypatch.setattr("fasttrain.utils._HOST_DEVICES", host_devices)
    counts = [3, 4, 3, 0, 9, 1, 5]  # together 3, 7, 10, 10, 19, 20, 25
    batches = [(X[:2], torch.ones_like(Y[:2]).view(-1).index_fill_(0, torch.arange(count, 16), IGNORE).view(2, -1))
               for count in counts]
    events: list[tuple[str, int]] = []

    class Watch(Callback):
        def on_log(self, state: TrainState, record: Any) -> None:
            events.append(("log", state.step))

        def on_eval(self, state: TrainState, result: Any) -> None:
            events.append(("eval", state.step))

    state = make_state(batches)
    config = TrainConfig(max_steps=7, every_tokens={"log": 5, "eval": 10, "save": 4}, log_every_steps=1,
                         eval_every_steps=1, save_every_steps=1)  # tokens take the place of these
    fit(state, config, Parts(hooks=Hooks([Watch()]), evaluate=lambda: EvalResult(1.0, 1.0, None, None, 1),
                             save=lambda: events.append(("save", state.step))))
    steps = {kind: [step for what, step in events if what == kind] for kind in ("log", "eval", "save")}
    assert steps == {"log": [2, 3, 5, 6, 7], "eval": [3, 6, 7], "save": [2, 3, 5, 6, 7]}  # 7: the end of the run


def test_the_logged_loss_is_over_the_targets_of_its_interval() -> None:
    losses: list[float] = []

    class Watch(Callback):
        def on_log(self, state: TrainState, record: Any) -> None:
            losses.append(record["loss"])

    model = Bigram()
    pieces = [(X[:1], Y[:1]), (X[1:], Y[1:])]
    with torch.no_grad():
        expected = float(F.cross_entropy(model(X).flatten(0, 1), Y.flatten(), ignore_index=IGNORE))
    frozen = make_state(pieces, model, lambda model: torch.optim.SGD(model.parameters(), lr=0.0))
    fit(frozen, TrainConfig(max_steps=4, log_every_steps=2), Parts(hooks=Hooks([Watch()])))
    assert losses == pytest.approx([expected, expected], rel=1e-6)


def test_a_plateau_scheduler_follows_the_validation_loss() -> None:
    def plateau(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)

    state = make_state(token_loader(3), scheduler=plateau)
    result = EvalResult(1.0, 1.0, None, None, 1)
    fit(state, TrainConfig(max_steps=3, eval_every_steps=1), Parts(evaluate=lambda: result))
    assert state.optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 * 0.25)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_schedules_warm_up_to_the_peak_and_end_at_the_floor(schedule: str) -> None:
    factors = [lr_factor(step, schedule=schedule, warmup_steps=4, max_steps=20, floor=0.1) for step in range(25)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    end = 1.0 if schedule == "constant" else 0.1
    assert factors[19:] == pytest.approx([end] * 6)
    assert all(one >= other for one, other in itertools.pairwise(factors[4:]))
    if schedule != "constant":
        assert lr_factor(12, schedule=schedule, warmup_steps=5, max_steps=20, floor=0.0) == pytest.approx(0.5)


def test_each_group_keeps_its_own_peak_and_the_common_floor() -> None:
    model = Bigram()
    groups = [{"params": model.table.parameters(), "lr": 1.0}, {"params": model.head.parameters()}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    scheduler = build_scheduler(optimizer, TrainConfig(lr=0.5, min_lr=0.05), max_steps=3)
    assert scheduler.get_last_lr() == [1.0, 0.1]
    for _ in range(2):
        optimizer.step()
        scheduler.step()
    assert scheduler.get_last_lr() == pytest.approx([0.05, 0.05])


def test_a_stream_goes_on_over_epochs_in_new_orders_and_resumes_by_replay() -> None:
    torch.manual_seed(1)
    stream = BatchStream(plain_loader(3))
    first = [stream.next_batch()[0] for _ in range(7)]  # type: ignore[index]
    assert (stream.epoch, stream.batch) == (2, 1)
    epochs = [torch.cat(first[0:3]), torch.cat(first[3:6])]
    assert not torch.equal(*epochs)
    assert torch.equal(*(torch.sort(epoch.flatten())[0] for epoch in epochs))
    torch.manual_seed(1)
    stopped = BatchStream(plain_loader(3))
    for _ in range(5):
        stopped.next_batch()
    state = copy_of(stopped.state_dict())
    expected = torch.get_rng_state()
    torch.manual_seed(99)
    resumed = BatchStream(plain_loader(3))
    resumed.load_state_dict(state)
    torch.set_rng_state(expected)
    assert all(torch.equal(resumed.next_batch()[0], batch) for batch in first[5:])  # type: ignore[index]


def test_a_loaders_own_generator_is_replayed_and_put_back() -> None:
    def make() -> BatchStream:
        return BatchStream(plain_loader(3, generator=torch.Generator().manual_seed(7)))

    straight = make()
    expected = [straight.next_batch()[0] for _ in range(9)]  # type: ignore[index]
    stopped = make()
    for _ in range(4):
        stopped.next_batch()
    resumed = make()
    resumed.load_state_dict(copy_of(stopped.state_dict()))
    assert all(torch.equal(resumed.next_batch()[0], batch) for batch in expected[4:])  # type: ignore[index]


def test_samplers_are_told_the_epoch() -> None:
    data = TensorDataset(torch.arange(6))
    sampler: Any = DistributedSampler(data, num_replicas=1, rank=0, shuffle=True)
    stream = BatchStream(DataLoader(data, batch_size=6, sampler=sampler))
    epochs = [stream.next_batch()[0].tolist() for _ in range(3)]  # type: ignore[index]
    expected = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        expected.append(list(sampler))
    assert epochs == expected and epochs[0] != epochs[1]


def test_the_last_checkpoint_knows_the_last_validation_loss() -> None:
    """Also where the end is seen only when no further batch comes, after the step's own checkpoint."""
    for limits, saves in (({"max_steps": 4}, [2, 4]), ({"max_epochs": 2}, [2, 4, 4])):
        state = make_state(token_loader(2), max_epochs=limits.get("max_epochs", 0))
        saved: list[tuple[int, float]] = []
        fit(state, TrainConfig(**limits, save_every_steps=2), Parts(  # type: ignore[arg-type]
            evaluate=lambda: EvalResult(1.5, 1.0, None, None, 1),
            save=lambda: saved.append((state.step, state.counters.last_val_loss))))  # noqa: B023
        assert [step for step, _ in saved] == saves and saved[-1][1] == 1.5


def test_data_that_can_be_read_once_end_the_run_and_say_so(capsys: pytest.CaptureFixture[str]) -> None:
    state = make_state(iter([(X, Y)] * 3))
    assert fit(state, TrainConfig(max_steps=9)) == "completed"
    assert state.step == 3 and "can be read only once" in state.stream.end_reason
    assert "only once" in capsys.readouterr().out


@pytest.mark.parametrize("make", [token_loader, plain_loader])
def test_peeking_disturbs_neither_the_loader_nor_the_generators(make: Any) -> None:
    torch.manual_seed(3)
    expected = [batch[0] for batch in make()]
    torch.manual_seed(3)
    loader = make()
    assert len(peek_batches(loader, 2)) == 2
    assert all(torch.equal(one[0], other) for one, other in zip(loader, expected))
    assert peek_batches(iter([1, 2]), 1) == []


def test_a_loss_that_reaches_no_parameter_of_the_optimizer_is_refused() -> None:
    model = Bigram()
    unused = nn.Linear(2, 2)
    state = TrainState(model, AdamW(unused.parameters()), BatchStream([(X, Y)]))
    with pytest.raises(ValueError, match="no parameter that the optimizer holds received a gradient"):
        fit(state, TrainConfig(max_steps=1))


def test_logits_learn_a_bigram_rule_to_the_end() -> None:
    state = make_state(plain_loader(6))
    fit(state, TrainConfig(max_steps=250))
    assert state.counters.train_loss < 0.1 < math.log(VOCAB)


def test_wsd_is_flat_and_falls_at_the_end_and_inverse_sqrt_keeps_falling() -> None:
    wsd = [lr_factor(step, schedule="wsd", warmup_steps=2, max_steps=20, floor=0.1, decay_ratio=0.25)
           for step in range(22)]
    assert wsd[:15] == pytest.approx([0.5, *[1.0] * 14]) and wsd[14] == 1.0 > wsd[15]
    assert wsd[19:] == pytest.approx([0.1] * 3)
    assert [a - b for a, b in itertools.pairwise(wsd[14:20])] == pytest.approx([0.18] * 5)
    root = [lr_factor(step, schedule="inverse_sqrt", warmup_steps=4, max_steps=0, floor=0.2) for step in range(200)]
    assert root[:4] == [0.25, 0.5, 0.75, 1.0]
    assert root[15] == pytest.approx(0.5) and root[35] == pytest.approx(1 / 3) and root[199] == 0.2


def test_a_warmup_below_one_is_a_share_of_the_planned_steps() -> None:
    def rates(**config: Any) -> list[float]:
        optimizer = torch.optim.SGD(Bigram().parameters(), lr=1.0)
        scheduler = build_scheduler(optimizer, TrainConfig(lr=1.0, schedule="constant", **config), max_steps=10)
        seen = []
        for _ in range(4):
            seen += scheduler.get_last_lr()
            optimizer.step()
            scheduler.step()
        return seen

    assert rates(warmup_steps=0.3) == rates(warmup_steps=3) == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0])
    with pytest.raises(ValueError, match=r"warmup_steps is 0\.3, a share, which needs the number of steps"):
        build_scheduler(torch.optim.SGD(Bigram().parameters()), TrainConfig(warmup_steps=0.3, schedule="constant"), 0)


SCHEDULERS: dict[str, Any] = {
    "OneCycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=9),
    "warm restarts": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "sequence": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o, [torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=2), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)],
        milestones=[2]),
    "multi-step": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 4], 0.5),
    "cyclic": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_any_torch_scheduler_steps_once_an_update_and_resumes(name: str, tmp_path: Path) -> None:
    def run(directory: Path, steps: int) -> list[float]:
        model, rates = Bigram(), []

        class Rates(Callback):
            def on_step(self, state: TrainState) -> None:
                rates.append(state.counters.last_lr)

        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        tiny_trainer(directory, model=model, optimizer=optimizer, scheduler=SCHEDULERS[name](optimizer),
                     max_steps=steps, callbacks=[Rates()]).train()
        return rates

    optimizer = torch.optim.SGD(Bigram().parameters(), lr=0.05, momentum=0.9)
    scheduler, wanted = SCHEDULERS[name](optimizer), []
    for _ in range(6):
        wanted.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert run(tmp_path / "one", 6) == pytest.approx(wanted)
    assert run(tmp_path / "two", 3) + run(tmp_path / "two", 6) == pytest.approx(wanted)


@pytest.mark.parametrize("total", [{"global_batch_size": 8}, {"global_batch_tokens": 8 * LENGTH}])
@pytest.mark.parametrize("make", [token_loader, lambda: [tokens(2 * LENGTH, i).view(2, LENGTH) for i in range(9)]])
def test_micro_steps_are_derived_from_sequences_or_tokens(total: dict[str, int], make: Any) -> None:
    trainer = tiny_trainer(loader=make(), model=Bigram(), max_steps=1, **total)
    trainer.train()
    assert trainer.state is not None and trainer.state.stream.epoch == 0 and trainer.state.stream.batch == 4


def test_hooks_that_nobody_overrides_are_not_called_and_epochs_and_gradients_are_told() -> None:
    class Quiet(Callback):
        pass

    class Watcher(Callback):
        def __init__(self) -> None:
            self.epochs: list[int] = []
            self.gradients: list[bool] = []

        def on_epoch_end(self, state: TrainState, epoch: int) -> None:
            self.epochs.append(epoch)

        def on_gradients(self, state: TrainState) -> None:
            self.gradients.append(all(p.grad is not None for p in state.model.parameters()))

    assert not any(Hooks([Quiet()])._bound.values())
    watcher = Watcher()
    tiny_trainer(loader=token_loader(2), model=Bigram(), max_steps=5, callbacks=[watcher]).train()
    assert watcher.epochs == [0, 1] and watcher.gradients == [True] * 5


def test_evaluating_before_the_first_step_happens_once(tmp_path: Path) -> None:
    seen: list[int] = []

    class Evaluations(Callback):
        def on_eval(self, state: TrainState, result: Any) -> None:
            seen.append(state.step)

    for steps in (2, 4):
        tiny_trainer(tmp_path, model=Bigram(), val_dataloader=token_loader(1), eval_at_start=True, max_steps=steps,
                     callbacks=[Evaluations()]).train()
    assert seen == [0, 2, 4]


def test_the_first_named_set_decides_and_all_are_kept() -> None:
    one, two = token_loader(1), token_loader(3, seed=7)
    trainer = tiny_trainer(model=Bigram(), val_dataloader={"one": one, "two": two}, max_steps=2)
    result = trainer.train()
    both = trainer.evaluate()
    assert list(both.sets) == ["one", "two"] and both.loss == both.sets["one"].loss == result.val_loss
    assert both.sets["two"] == trainer.evaluate(two)
    with pytest.raises(ValueError, match="empty mapping"):
        trainer.evaluate({})
