"""Each switch does what it reports, changes no number, and can be turned back."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fasttrain.config import TrainConfig
from fasttrain.models.gpt import GPT, GPTConfig
from fasttrain.ops import backend_info
from fasttrain.ops.adamw import AdamW
from fasttrain.optimizations import apply_optimizations, repeated_blocks

MEASURE_FAULTS = """
import json, resource, torch
from fasttrain.optimizations import tune_cpu_memory

def faults_per_tensor(size=16_000_000):  # 64 MB, more than glibc ever keeps by itself: 15,625 pages
    for _ in range(3): torch.ones(size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5): torch.ones(size)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 5

def resident():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1])

base = faults_per_tensor()
switch = tune_cpu_memory()
kept = faults_per_tensor()
held = resident()
switch.restore()
given_back = held - resident()
print(json.dumps({"on": switch.on, "reason": switch.reason, "base": base, "kept": kept,
                  "after": faults_per_tensor(64_000_000), "given_back_kib": given_back}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the policy is glibc's")
def test_the_memory_policy_ends_page_faults_and_can_be_turned_back() -> None:
    seen = json.loads(run(MEASURE_FAULTS))
    if not seen["on"]:
        assert "glibc" in seen["reason"]
        return
    assert seen["kept"] < 50
    assert seen["after"] > 0.8 * seen["base"]  # of a tensor that fits into no hole which the heap may still have
    assert seen["given_back_kib"] > 25_000


def test_importing_does_not_change_the_allocator() -> None:
    untouched = MEASURE_FAULTS.split("switch =")[0] + "print(base)"
    imported = untouched.replace("base = ", "import fasttrain.trainer, fasttrain.ops, fasttrain.cli\nbase = ")
    before, after = (float(run(code)) for code in (untouched, imported))
    assert after > 0.8 * before


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.calls = 0

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        self.calls += 1
        return x + scale * torch.tanh(self.linear(x))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)])
        self.blocks = nn.ModuleList([Block() for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, scale=0.5)
        return x.square().sum()


@pytest.mark.parametrize(("mode", "calls"), [("full", [2, 2, 2]), ("every_2", [2, 1, 2]), ("selective", [2, 2, 2])])
def test_activation_checkpointing_recomputes_blocks_and_changes_no_gradient(mode: str, calls: list[int]) -> None:
    torch.manual_seed(0)
    model, x, config = Stack(), torch.randn(4, 8), TrainConfig(max_steps=1)
    model(x).backward()
    expected = [p.grad.clone() for p in model.blocks.parameters() if p.grad is not None]
    names = list(model.state_dict())
    model.zero_grad()
    trained, decisions = apply_optimizations(
        model, replace(config, activation_checkpointing=mode), torch.device("cpu")
    )
    try:
        for block in model.blocks:
            block.calls = 0
        trained(x).backward()
        assert [block.calls for block in model.blocks] == calls
        assert all(torch.equal(p.grad, e) for p, e in zip(model.blocks.parameters(), expected))
        assert list(model.state_dict()) == names
        with torch.no_grad():
            trained(x)
        assert model.blocks[0].calls == 3  # nothing to recompute without gradients
    finally:
        for decision in decisions:
            decision.restore()
    model(x).backward()
    assert model.blocks[0].calls == 4


def test_activation_checkpointing_of_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Linear holds no nn\.ModuleList.*'none'"):
        apply_optimizations(nn.Linear(2, 2), TrainConfig(activation_checkpointing="full"), torch.device("cpu"))


def test_the_longest_uniform_list_is_taken_for_the_blocks() -> None:
    model = Stack()
    assert repeated_blocks(model) == list(model.blocks)


def test_every_switch_reports_its_state_with_a_reason() -> None:
    _, decisions = apply_optimizations(Stack(), TrainConfig(), torch.device("cpu"))
    try:
        assert {d.name: d.on for d in decisions}["torch.compile"] is False
        assert all(d.reason for d in decisions) and len({d.name for d in decisions}) == len(decisions) == 9
    finally:
        for decision in decisions:
            decision.restore()


def test_the_fused_linear_loss_is_reported_with_its_reason() -> None:
    gpt = GPT(GPTConfig(vocab_size=11, hidden_size=16, num_layers=1, num_heads=2, max_seq_len=8))
    compiled = backend_info()["linear_cross_entropy"]["cpu"].impl == "cpp"
    for model, own_loss, on, reason in (
        (Stack(), False, False, "return_hidden=True"),
        (gpt, True, False, "loss_fn is the user's own"),
        (gpt, False, compiled, ""),
    ):
        _, decisions = apply_optimizations(model, TrainConfig(), torch.device("cpu"), own_loss=own_loss)
        for decision in decisions:
            decision.restore()
        report = next(decision for decision in decisions if decision.name == "fused linear loss")
        assert report.on is on and reason in report.reason


def test_selective_checkpointing_keeps_products_and_recomputes_the_rest() -> None:
    class Counted(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.products = self.tanhs = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.products += func in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default)
            self.tanhs += func is torch.ops.aten.tanh.default
            return func(*args, **(kwargs or {}))

    seen = {}
    for mode in ("none", "selective", "full"):
        model = Stack()
        trained, decisions = apply_optimizations(
            model, TrainConfig(max_steps=1, activation_checkpointing=mode), torch.device("cpu"))
        loss = trained(torch.randn(4, 8))
        with Counted() as counted:
            loss.backward()
        seen[mode] = (counted.products, counted.tanhs)
        for decision in decisions:
            decision.restore()
    assert seen["selective"][0] == seen["none"][0] < seen["full"][0]
    assert (seen["none"][1], seen["selective"][1], seen["full"][1]) == (0, 3, 3)


def test_the_optimizer_and_the_loader_are_part_of_the_picture() -> None:
    from torch.utils.data import DataLoader

    from fasttrain.optimizations import optimizer_switches

    model = Stack()
    ours, theirs = AdamW(model.parameters(), state_dtype="bfloat16"), torch.optim.SGD(model.parameters())
    fused, narrow = optimizer_switches(ours)
    assert fused.name == "fused AdamW" and narrow.on and "bfloat16" in narrow.reason
    assert [(item.on, "SGD" in item.reason) for item in optimizer_switches(theirs)] == [(False, True), (False, False)]

    def prefetching(loader: Any) -> Any:
        _, decisions = apply_optimizations(model, TrainConfig(max_steps=1), torch.device("cpu"), loader=loader)
        return next((item.on, item.reason) for item in decisions if item.name == "data prefetch")

    assert prefetching(DataLoader([1, 2], num_workers=2)) == (True, "2 worker processes of the DataLoader")
    on, reason = prefetching(DataLoader([1, 2]))
    assert not on and "num_workers" in reason


def test_a_compiled_hugging_face_model_still_makes_no_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    from fasttrain.losses import batch_loss
    from fasttrain.optimizations import compile_model

    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=29, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2))
    compiled_parts = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled_parts.append(type(self).__name__))
    compiled, decision = compile_model(model)
    assert compiled is model and compiled_parts == ["LlamaModel"] and decision.on
    heads: list[int] = []
    model.lm_head.register_forward_hook(lambda *_: heads.append(1))
    batch_loss(compiled, torch.arange(8)[None])
    assert heads == []
