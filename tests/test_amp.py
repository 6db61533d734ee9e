"""The precision policy: a reason for every choice, no reduced format where it does not pay, the scaler in its order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import VOCAB, Bigram, one_thread, plain_loader, tiny_trainer, tokens  # noqa: F401
from torch.amp.grad_scaler import GradScaler

from fasttrain import amp
from fasttrain.amp import choose_policy, cpu_bf16_features, probe_cpu_bf16_gain
from fasttrain.batch_stream import BatchStream
from fasttrain.config import TrainConfig
from fasttrain.ops.adamw import AdamW
from fasttrain.state import TrainState
from fasttrain.training_loop import fit

CPU = torch.device("cpu")


@pytest.mark.parametrize(("flags", "found"), [
    ("flags\t\t: fpu avx2 avx512f avx512_bf16 amx_bf16", ("avx512_bf16", "amx_bf16")),
    ("flags\t\t: fpu sse avx2 fma", ()), ("Features\t: fp asimd bf16", ("bf16",)), ("nothing", ())])
def test_bf16_instructions_are_read_from_the_kernels_list(tmp_path: Path, flags: str, found: tuple[str, ...]) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor : 0\n{flags}\n")
    assert cpu_bf16_features(tmp_path / "cpuinfo") == found
    assert cpu_bf16_features(tmp_path / "absent") == ()


@pytest.mark.parametrize("use_amp", [True, None])
def test_a_cpu_without_bf16_hardware_stays_in_float32_and_says_so(
        monkeypatch: pytest.MonkeyPatch, use_amp: Any) -> None:
    monkeypatch.setattr(amp, "cpu_bf16_features", lambda: ())
    monkeypatch.setattr(amp, "probe_cpu_bf16_gain", lambda: pytest.fail("no hardware: nothing to probe"))
    policy = choose_policy("auto", use_amp, CPU)
    assert policy.dtype == torch.float32 and "no bfloat16 instructions" in policy.reason
    with policy.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


@pytest.mark.parametrize(("capability", "dtype"), [((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16),
                                                   ((7, 5), torch.float16)])
@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_a_gpu_gets_bfloat16_where_it_is_native_and_else_float16_with_a_scaler(
        monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    policy = choose_policy("auto", True, torch.device("cuda"))
    assert policy.dtype == dtype and "some GPU" in policy.reason
    assert policy.needs_scaler == (policy.build_scaler() is not None) == (dtype == torch.float16)
    named = choose_policy("float16", None, torch.device("cuda"))
    assert named.dtype == torch.float16 and named.build_scaler() is not None
    assert choose_policy("bfloat16", None, CPU).build_scaler() is None


@pytest.mark.parametrize(("gain", "dtype"), [(1.9, torch.bfloat16), (1.2, torch.bfloat16), (1.05, torch.float32)])
def test_bf16_hardware_must_also_be_faster(monkeypatch: pytest.MonkeyPatch, gain: float, dtype: torch.dtype) -> None:
    monkeypatch.setattr(amp, "cpu_bf16_features", lambda: ("avx512_bf16",))
    monkeypatch.setattr(amp, "probe_cpu_bf16_gain", lambda: gain)
    policy = choose_policy("auto", True, CPU)
    assert policy.dtype == dtype and f"{gain:.1f}x" in policy.reason
    with policy.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_the_probe_leaves_threads_generators_and_gradients_alone() -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    probe_cpu_bf16_gain.cache_clear()
    gain = probe_cpu_bf16_gain()
    assert 0 < gain < 1000
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)


def test_a_named_precision_is_obeyed_and_contradictions_are_refused() -> None:
    assert choose_policy("bfloat16", None, CPU).dtype == torch.bfloat16
    assert choose_policy("float32", None, CPU).dtype == torch.float32
    assert choose_policy("auto", False, CPU).dtype == torch.float32
    for precision, use_amp, message in (("float32", True, "use_amp is True"), ("bfloat16", False, "drop one"),
                                        ("float16", None, "needs a CUDA device")):
        with pytest.raises(ValueError, match=message):
            choose_policy(precision, use_amp, CPU)


def test_training_in_bfloat16_keeps_weights_and_moments_in_float32(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, plain_loader(), precision="bfloat16", max_steps=60, lr=3e-2)
    first = trainer.evaluate(trainer.train_dataloader).loss
    trainer.train()
    assert trainer.evaluate(trainer.train_dataloader).loss < 0.8 * first
    assert trainer.state is not None
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    assert all(state["exp_avg"].dtype == torch.float32 for state in trainer.state.optimizer.state.values())


def test_a_resume_keeps_the_precision_the_run_was_trained_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                             capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(amp, "cpu_bf16_features", lambda: ())
    tiny_trainer(tmp_path, precision="auto").train()
    monkeypatch.setattr(amp, "cpu_bf16_features", lambda: ("avx512_bf16",))
    monkeypatch.setattr(amp, "probe_cpu_bf16_gain", lambda: 9.0)
    again = tiny_trainer(tmp_path, precision="auto", max_steps=8)
    assert again.amp.dtype == torch.bfloat16
    again.train()
    assert again.amp.dtype == torch.float32 and "as the checkpoint was trained" in capsys.readouterr().out


def scaled_state(optimizer: torch.optim.Optimizer, model: Any, batches: Any, scaler: GradScaler | None) -> TrainState:
    return TrainState(model, optimizer, BatchStream(batches), None, scaler)


@pytest.mark.parametrize("accum", [1, 3])
def test_gradients_are_unscaled_once_then_clipped_then_stepped_then_the_scale_moves(accum: int) -> None:
    calls: list[str] = []

    class Recorded(GradScaler):
        def scale(self, outputs: Any) -> Any:
            calls.append("scale")
            return super().scale(outputs)

        def unscale_(self, optimizer: Any) -> None:
            calls.append("unscale")
            super().unscale_(optimizer)

        def step(self, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
            calls.append(f"step with a norm of {float(gradients.norm()):.4f}")
            return super().step(optimizer, *args, **kwargs)

        def update(self, new_scale: Any = None) -> None:
            calls.append("update")
            super().update(new_scale)

    model = Bigram()
    state = scaled_state(torch.optim.SGD(model.parameters(), lr=0.1), model,
                         [(tokens(8).view(1, 8), torch.full((1, 8), 3))], Recorded("cpu", init_scale=64.0))
    fit(state, TrainConfig(max_steps=2, max_grad_norm=0.05, grad_accum_steps=accum))
    assert calls == [*["scale"] * accum, "unscale", "step with a norm of 0.0500", "update"] * 2


@pytest.mark.parametrize("ours", [True, False])
def test_the_gradient_scaler_changes_nothing_but_skips_overflows(ours: bool) -> None:
    """float16 needs a GPU, its scaler does not: with a power of two as scale the updates are those without it."""
    batch = (tokens(8).view(1, 8), torch.full((1, 8), 3))
    models = [Bigram(), Bigram()]
    scaler = GradScaler("cpu", init_scale=64.0, growth_interval=3)
    config = TrainConfig(max_steps=4, max_grad_norm=0.5)
    for model, used in zip(models, (None, scaler)):
        optimizer: torch.optim.Optimizer = (AdamW if ours else torch.optim.AdamW)(model.parameters(), lr=0.01)
        state = scaled_state(optimizer, model, [batch], used)
        fit(state, config)
    for one, other in zip(models[0].parameters(), models[1].parameters()):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert scaler.get_scale() == 128.0  # grew once
    before = [p.detach().clone() for p in models[1].parameters()]
    scaler.update(new_scale=2.0**127)  # the next gradients overflow
    fit(state, TrainConfig(max_steps=5, nonfinite="stop"))
    assert all(torch.equal(p, old) for p, old in zip(models[1].parameters(), before))
    assert scaler.get_scale() == 2.0**126 and state.counters.nonfinite_steps == 1
    assert state.stop_reason == ""  # feeling for the scale is no reason to stop
    assert models[1].head.out_features == VOCAB
