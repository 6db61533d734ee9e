"""`fasttrain plan`: its numbers against real runs, AdamW's real state, and PyTorch's fake process group."""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

from fasttrain import AdamW
from fasttrain.backend import CPP_PROBLEM
from fasttrain.cli import main
from fasttrain.distributed import Team
from fasttrain.losses import batch_loss
from fasttrain.models.gpt import GPT, GPTConfig
from fasttrain.optimizations import _activation_checkpointing, repeated_blocks
from fasttrain.plan import Plan, Setting, optimizer_bytes, parse_memory, sharded_numel
from fasttrain.planned_model import PlannedModel, describe, numel, planned_model
from fasttrain.sharded_memory import OUTSIDE, Held, Moment, Unit, worst_moment
from fasttrain.sharding import Shards
from fasttrain.step_memory import _loss, trace_step

SIZES = {"layers": 4, "dim": 128, "heads": 4, "kv_heads": 2, "intermediate": 0, "vocab": 4096}
BATCH, SEQ_LEN = 4, 128


def small(**changes: int) -> PlannedModel:
    return planned_model("gpt", {**SIZES, **changes}, SEQ_LEN)


def setting(**changes: Any) -> Setting:
    given = {"num_gpus": 8, "memory_bytes": 1e9, "batch_size": BATCH, "seq_len": SEQ_LEN, "precision": "float32"}
    return Setting(**{**given, "device": "cpu", **changes})


def peak_of_allocator(call: Callable[[], Any]) -> int:
    """Most bytes that PyTorch's CPU allocator had given out at one time during `call`, its kernels' own included."""
    gc.collect()  # what earlier tests left must not be given back meanwhile: it would count below zero
    with profile(profile_memory=True) as found:
        call()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def real_step(model: nn.Module, fused: bool = True, precision: str = "float32") -> None:
    ids = torch.zeros((BATCH, SEQ_LEN), dtype=torch.int64)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16"):
        loss = _loss(model, ids, fused)
    loss.backward()  # type: ignore[no-untyped-call]


@pytest.mark.skipif(bool(CPP_PROBLEM), reason="the compiled extension is not installed")
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize(("recompute", "fused"), [("none", True), ("selective", True), ("full", True), ("none", False)])
def test_the_peak_of_a_real_step_is_within_a_fiftieth(recompute: str, fused: bool, micro_batches: int) -> None:
    """Gradients, activations and what the loss takes, of a step of one micro-batch and of two."""
    plan = Plan(small(), setting(fused_loss=fused, grad_accum_steps=micro_batches))
    model = plan.model.build(torch.float32, SEQ_LEN)
    _activation_checkpointing(model, recompute)
    measured = peak_of_allocator(lambda: [real_step(model, fused) for _ in range(micro_batches)])
    row = plan.row("none", recompute, plan.setting)
    planned = row.activations + row.gradients
    assert abs(planned / measured - 1) < 0.02, f"planned {planned / 2**20:.2f} MiB, measured {measured / 2**20:.2f}"


@pytest.mark.skipif(bool(CPP_PROBLEM), reason="the compiled extension is not installed")
@pytest.mark.parametrize(("precision", "by"), [("float32", "torch"), ("float32", "onednn"), ("float32", "fasttrain"),
                                               ("bfloat16", "torch")])  # fmt: skip
def test_what_the_fused_loss_takes_inside_is_planned_for_each_way_to_multiply(
        monkeypatch: pytest.MonkeyPatch, precision: str, by: str) -> None:
    for module in ("products", "plan"):
        monkeypatch.setattr(f"fasttrain.{module}.fastest", lambda: (by, "a test says so"))
    plan = Plan(small(), setting(precision=precision))
    model = plan.model.build(torch.float32, SEQ_LEN)
    measured = peak_of_allocator(functools.partial(real_step, model, True, precision))
    row = plan.row("none", "none", plan.setting)
    planned = row.activations + row.gradients
    close = 0.02 if precision == "float32" else 0.04
    assert abs(planned / measured - 1) < close, f"planned {planned / 2**20:.2f} MiB, measured {measured / 2**20:.2f}"


def test_a_trace_on_fake_tensors_equals_one_on_real_ones() -> None:
    build = functools.partial(small().build, torch.float32, SEQ_LEN)
    for recompute in ("none", "full"):
        traces = [trace_step(build, 2, SEQ_LEN, recompute=recompute, fused_loss=False, fake=fake)
                  for fake in (True, False)]  # fmt: skip
        assert traces[0].held == traces[1].held and traces[0].kept == traces[1].kept == 0
        assert abs(traces[0].peak / traces[1].peak - 1) < 0.02


def test_recomputation_and_the_fused_loss_each_hold_less() -> None:
    plan = Plan(small(), setting())
    none, selective, full = (plan.trace(recompute, plan.setting).held for recompute in ("none", "selective", "full"))
    assert full < selective < none
    logits = plan.trace("none", setting(fused_loss=False)).held
    tokens, vocab, dim = BATCH * SEQ_LEN, SIZES["vocab"], SIZES["dim"]
    finished = 4 * (vocab + tokens) * dim  # the fused loss holds the gradients of head and hidden states instead
    assert logits - none > 4 * tokens * vocab * 0.9 - finished


def test_autocasts_copies_of_weights_are_told_apart() -> None:
    build = functools.partial(small().build, torch.float32, SEQ_LEN)
    trace = trace_step(build, 1, SEQ_LEN, autocast=torch.bfloat16)
    matrices = sum(p.numel() for block in repeated_blocks(build()) for p in block.parameters() if p.dim() == 2)
    assert matrices * 2 <= trace.casts <= (matrices + SIZES["vocab"] * SIZES["dim"]) * 2
    assert trace_step(build, 1, SEQ_LEN).casts == 0


@pytest.mark.parametrize("master", [False, True])
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "int8"])
def test_optimizer_bytes_are_those_of_the_real_state(state_dtype: str, master: bool) -> None:
    weights = "bfloat16" if master else "float32"
    model = GPT(GPTConfig(vocab_size=300, num_layers=2, num_heads=2, hidden_size=64))
    model.to(torch.bfloat16 if master else torch.float32)
    optimizer = AdamW(model.parameters(), state_dtype=state_dtype, master="remainder" if master else None)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tensors = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    real = sum(tensor.nbytes for tensor in tensors if tensor.dim() > 0)
    given = setting(weights=weights, master=master, optimizer_state_dtype=state_dtype)
    assert sum(optimizer_bytes(p.numel(), p.numel(), given) for p in model.parameters()) == real


@pytest.fixture
def fake_group(request: pytest.FixtureRequest) -> Iterator[int]:
    """A process group of so many ranks, of which this process is rank 0 and nobody else exists."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=request.param, store=FakeStore())
    yield request.param
    dist.destroy_process_group()


def sharded(model: nn.Module, ranks: int) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (ranks,))
    for block in repeated_blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


@pytest.mark.parametrize("fake_group", [8, 24, 256, 4096], indirect=True)
def test_a_rank_holds_what_fully_shard_gives_it(fake_group: int) -> None:
    config = {"vocab_size": 1009, "num_layers": 2, "num_heads": 4, "hidden_size": 64}
    with torch.device("meta"):
        model = sharded(GPT(GPTConfig(**config)), fake_group)
    for parameter in model.parameters():
        local: Any = parameter.to_local()
        assert local.numel() == sharded_numel(parameter.shape, fake_group)
        held = parameter._local_tensor.untyped_storage().nbytes()
        assert held == 4 * sharded_numel(parameter.shape, fake_group)
    plan = Plan(describe("", lambda *_: model, model), setting(num_gpus=fake_group))
    assert plan.model.num_parameters == sum(parameter.numel() for parameter in model.parameters())


class Collectives(TorchDispatchMode):
    """Bytes that a ring sends for every collective call."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.sent, self._ranks = 0.0, ranks

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if "allreduce_" in name:
            self.sent += sum(tensor.nbytes for tensor in args[0]) * 2 * (self._ranks - 1) / self._ranks
        if any(part in name for part in ("allgather_base", "alltoall_base", "reduce_scatter_base",
                                         "_reduce_scatter_tensor")):
            whole = max(tensor.nbytes for tensor in args[:2])
            self.sent += whole * (self._ranks - 1) / self._ranks
        return func(*args, **(kwargs or {}))


@pytest.fixture
def alike(fake_group: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """That group, whose other ranks have this one's numbers: a sum is so many times as much."""
    plain = dist.all_reduce

    def all_reduce(tensor: Tensor, op: Any = dist.ReduceOp.SUM, **options: Any) -> Any:
        work = plain(tensor, op, **options)
        tensor.mul_(fake_group if op == dist.ReduceOp.SUM else 1)
        return work

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    return fake_group


def spread(model: nn.Module, ranks: int, strategy: str, micro_batches: int = 1) -> Shards:
    return Shards(Team(0, ranks), model, strategy, micro_batches, contextlib.nullcontext)


def spread_step(plan: Plan, strategy: str, recompute: str) -> Callable[[], None]:
    """One of as many micro-batches as the plan says; what stays is made."""
    micro_batches, done = plan.setting.grad_accum_steps, itertools.count(1)
    model = plan.model.build(torch.float32, SEQ_LEN)
    _activation_checkpointing(model, recompute)
    shards = spread(model, plan.setting.num_gpus, strategy, micro_batches)
    window = SimpleNamespace(is_last_pass=lambda accumulated: next(done) % accumulated == 0)
    shards.begin(SimpleNamespace(window=window))  # type: ignore[arg-type]
    loss, ids = shards.loss(batch_loss), torch.zeros((BATCH, SEQ_LEN), dtype=torch.int64)

    def step() -> None:
        for _ in range(micro_batches):
            loss(model, (ids, ids))[0].backward()  # type: ignore[no-untyped-call]
        model.zero_grad(set_to_none=True)

    step()
    return step


@pytest.mark.skipif(bool(CPP_PROBLEM), reason="the compiled extension is not installed")
@pytest.mark.parametrize("strategy", ["fsdp", "fsdp-vocab"])
@pytest.mark.parametrize(("fake_group", "micro_batches", "vocab", "recompute"), [
    (2, 1, 8192, "none"), (64, 1, 8192, "none"), (64, 2, 8192, "none"), (8, 3, 8192, "none"), (8, 1, 2048, "full"),
    (2, 2, 8192, "full"), (4, 1, 65536, "none")], indirect=["fake_group"])  # fmt: skip
def test_a_spread_step_sends_and_holds_what_is_planned(
        alike: int, strategy: str, micro_batches: int, vocab: int, recompute: str) -> None:
    """The peak is a bound, and no sum of parts that are largest at different moments: each vocabulary and way to
    recompute has its worst moment elsewhere (the loss, a block's backward, the sum of the embedding's gradient)."""
    plan = Plan(small(tie_embeddings=0, vocab=vocab), setting(num_gpus=alike, grad_accum_steps=micro_batches))
    row = plan.row(strategy, recompute, plan.setting)
    step = spread_step(plan, strategy, recompute)
    with Collectives(alike) as counted:
        step()
    assert counted.sent == pytest.approx(row.sent, rel=1e-3)
    measured = peak_of_allocator(step)
    planned = row.gathered + row.activations + row.gradients
    assert -0.005 < planned / measured - 1 < 0.05, f"planned {planned / 2**20:.2f}, measured {measured / 2**20:.2f} MiB"


def test_parts_that_are_most_at_different_moments_are_not_added_up() -> None:
    units, ranks = [Unit(10, 40), Unit(10, 40), Unit(5, 20)], 4  # 40, 40 and 20 bytes whole

    def worst(scored: int, backward: int, last: int, on_cpu: bool = False) -> Held:
        return worst_moment([
            Moment("forward", OUTSIDE, 0, 0), Moment("forward", 0, 0, 0), Moment("forwarded", 0, 0, 0),
            Moment("forward", 1, 0, 0), Moment("forwarded", 1, 0, scored), Moment("scored", OUTSIDE, 0, 0),
            Moment("backward", 1, 0, backward), Moment("summing", 1, 40, 40), Moment("summed", 1, 0, 0),
            Moment("backward", 0, 0, 0), Moment("summing", 0, 40, 40), Moment("summed", 0, 0, last),
            Moment("summing", OUTSIDE, 20, 20), Moment("summed", OUTSIDE, 0, 0)], units, ranks, on_cpu)

    assert worst(1000, 0, 0) == (60, 1000 - 25)  # outside, and the last block's buffer
    assert worst(0, 1000, 0) == (100, 1000 - 25)  # the first block's as well
    assert worst(0, 0, 1000) == (60, 1000 + 20 - 25)  # outside, and what is being summed
    assert sum(worst(0, 0, 0)) == 20 + 40 + 40 + 40 + 10 - 25  # a block's gradients beside it, and another's sum


@pytest.mark.parametrize("fake_group", [8, 24, 256, 4096], indirect=True)
def test_a_rank_of_a_divided_head_holds_what_is_planned(fake_group: int) -> None:
    config = GPTConfig(vocab_size=1009, num_layers=2, num_heads=4, hidden_size=64, tie_embeddings=False)
    with torch.device("meta"):
        model = GPT(config)
        spread(model, fake_group, "fsdp-vocab")
    for parameter in model.parameters():
        assert parameter.to_local().numel() == sharded_numel(parameter.shape, fake_group)  # type: ignore[operator]


def test_strategies_differ_in_what_they_divide() -> None:
    rows = {row.strategy: row for row in Plan(small(), setting(num_gpus=16)).rows()}
    assert set(rows) == {"none", "ddp", "fsdp", "hsdp"}
    assert rows["none"].sent == 0 and rows["ddp"].weights == rows["none"].weights
    assert rows["fsdp"].optimizer * 15 < rows["none"].optimizer < rows["fsdp"].optimizer * 16 + 1e5
    assert rows["fsdp"].weights < rows["hsdp"].weights < rows["ddp"].weights
    assert [row.strategy for row in Plan(small(), setting(num_gpus=1)).rows()] == ["none"]
    untied = {row.strategy: row for row in Plan(small(tie_embeddings=0), setting(num_gpus=16)).rows()}
    assert list(untied) == ["none", "ddp", "fsdp", "fsdp-vocab", "hsdp"]
    assert untied["fsdp-vocab"].gathered == untied["fsdp"].gathered - 4 * SIZES["vocab"] * SIZES["dim"]


def test_micro_batches_after_the_first_cost_fsdp_the_whole_gradients_and_one_gather_each() -> None:
    plans = [Plan(small(), setting(grad_accum_steps=steps)) for steps in (1, 2, 3)]
    one, two, three = (plan.row("fsdp", "none", plan.setting) for plan in plans)
    model = plans[0].model
    whole, blocks = 4 * model.num_parameters, 4 * sum(numel(shapes) for shapes in model.blocks)
    assert two.gathered == three.gathered and two.activations == three.activations
    assert one.total + blocks < two.total < one.total + whole  # the loss has made the head's gradient already
    assert three.sent - two.sent == two.sent - one.sent == pytest.approx(blocks * 7 / 8, abs=1)
    ddp = [plan.row("ddp", "none", plan.setting) for plan in plans[:2]]
    assert ddp[0].sent == ddp[1].sent and 0 < ddp[1].total - ddp[0].total <= ddp[0].gradients
    with pytest.raises(ValueError, match="grad_accum_steps is 0; it must be positive"):
        setting(grad_accum_steps=0)


def test_a_size_of_memory_is_read_in_both_units() -> None:
    assert parse_memory("80GB") == 80e9 and parse_memory("1.5 GiB") == 1.5 * 2**30 and parse_memory("1000") == 1000
    with pytest.raises(ValueError, match=r"memory is 'lots'; it must be a size such as 80GB"):
        parse_memory("lots")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit:
        main(["plan", *arguments])
    captured = capsys.readouterr()
    return int(exit.value.code or 0), captured.out, captured.err


TINY = ("--model", "gpt", "--layers", "2", "--dim", "64", "--heads", "2", "--vocab", "512", "--seq-len", "64")


def test_the_command_prints_a_table_that_calls_itself_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, *TINY, "--batch", "2", "--gpus", "16", "--memory", "2GB")
    assert status == 0 and "A model, not a measurement" in out and "hsdp" in out and "Nothing fits" not in out
    assert "fsdp-vocab" not in out
    _, out, _ = run(capsys, *TINY, "--batch", "2", "--gpus", "16", "--no-tie-embeddings", "--json")
    assert [row["strategy"] for row in json.loads(out)["strategies"]] == ["none", "ddp", "fsdp", "fsdp-vocab", "hsdp"]


def test_where_nothing_fits_the_command_says_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, *TINY, "--batch", "8", "--gpus", "1", "--memory", "4MB", "--json")
    found = json.loads(out)
    assert status == 0 and not any(row["fits"] for row in found["strategies"])
    assert any(line.startswith("--optimizer-state-dtype int8") for line in found["advice"])
    assert any(line.startswith("--batch 4 --grad-accum-steps 2: ") for line in found["advice"])
    assert found["note"].startswith("a model")


def test_models_are_found_by_name_and_by_config(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    sizes = {**SIZES, "dim": 64, "vocab": 256, "layers": 2}
    llama = planned_model("llama", sizes, 64)
    file = tmp_path / "config.json"
    llama.build(torch.float32, 64).config.save_pretrained(tmp_path)
    for path in (file, tmp_path):
        assert planned_model(str(path), {}, 64).shapes == llama.shapes
    held = Plan(llama, setting(seq_len=64)).trace("full", setting(seq_len=64)).held
    assert held < Plan(llama, setting(seq_len=64)).trace("none", setting(seq_len=64)).held
    file.write_text(json.dumps({"vocab_size": 256, "num_layers": 2, "hidden_size": 64, "num_heads": 2}))
    assert planned_model(str(file), {}, 64).vocab_size == 256
    file.write_text("{}")
    with pytest.raises(ValueError, match="neither model_type"):
        planned_model(str(file), {}, 64)
    with pytest.raises(ValueError, match=r"model is 'nothing'"):
        planned_model("nothing", {}, 64)
