"""The example decoder: what it computes, with and without its cache, padded and compiled."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fasttrain.models.gpt import GPT, GPTConfig, rotary_angles, rotate


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def small(**changes: Any) -> GPT:
    sizes = {"vocab_size": 61, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "hidden_size": 32, "max_seq_len": 48}
    model = GPT(GPTConfig(**{**sizes, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():  # far from the tame start: a wrong path must show
            parameter.mul_(1.0 + torch.rand_like(parameter)) if parameter.dim() < 2 else parameter.mul_(4.0)
    return model


def ids(*shape: int) -> Tensor:
    return torch.randint(0, 61, shape)


def by_the_book(model: GPT, tokens: Tensor) -> Tensor:
    """The same function of one row, written out: loops over heads and positions, no SDPA, complex rotation."""
    config = model.config
    D, E, group = config.hidden_size, config.head_size, config.num_heads // config.num_kv_heads

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + config.norm_eps).sqrt() * weight

    frequencies = config.rope_theta ** (-torch.arange(0, E, 2).double() / E)
    angles = torch.arange(len(tokens)).double()[:, None] * frequencies
    turn = torch.polar(torch.ones_like(angles), angles)
    weights = {name: value.double() for name, value in model.state_dict().items()}
    x = weights["token_embedding.weight"][tokens]
    for layer in range(config.num_layers):
        w = {name.split(".", 2)[2]: value for name, value in weights.items() if name.startswith(f"blocks.{layer}.")}
        qkv = norm(x, w["attention_norm.weight"]) @ w["attention.qkv.weight"].T
        kv_size = config.num_kv_heads * E
        q, k, v = qkv[:, :D].split(E, 1), qkv[:, D : D + kv_size].split(E, 1), qkv[:, D + kv_size :].split(E, 1)
        out = []
        for head in range(config.num_heads):
            turned = []
            for value in (q[head], k[head // group]):
                z = torch.complex(value[:, : E // 2], value[:, E // 2 :]) * turn
                turned.append(torch.cat((z.real, z.imag), 1))
            scores = turned[0] @ turned[1].T / math.sqrt(E)
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
            out.append(scores.softmax(1) @ v[head // group])
        x = x + torch.cat(out, 1) @ w["attention.out.weight"].T
        hidden = norm(x, w["mlp_norm.weight"]) @ w["mlp.gate_up.weight"].T
        gate, up = hidden.chunk(2, 1)
        x = x + (F.silu(gate) * up) @ w["mlp.down.weight"].T
    head_weight = weights["token_embedding.weight" if config.tie_embeddings else "head.weight"]
    return norm(x, weights["final_norm.weight"]) @ head_weight.T


@pytest.mark.parametrize(
    "changes", [{}, {"num_kv_heads": 0}, {"num_kv_heads": 1, "tie_embeddings": False, "rope_theta": 50.0}]
)
def test_logits_equal_the_architecture_written_out(changes: dict[str, Any]) -> None:
    model, tokens = small(**changes), ids(1, 13)
    torch.testing.assert_close(model(tokens)[0].double(), by_the_book(model, tokens[0]), rtol=1e-4, atol=1e-4)


def test_a_batch_can_be_overfitted_from_a_loss_of_ln_vocabulary() -> None:
    model = GPT(GPTConfig(vocab_size=61, num_layers=2, num_heads=4, hidden_size=64, max_seq_len=48))
    tokens = ids(4, 24)
    optimizer = torch.optim.AdamW(model.parameter_groups(0.1), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert abs(losses[0] - math.log(61)) < 0.1
    assert losses[-1] < 0.1


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_decoding_with_the_cache_equals_the_full_forward(kv_heads: int) -> None:
    model, tokens = small(num_kv_heads=kv_heads).eval(), ids(3, 20)
    with torch.inference_mode():
        full, cache = model(tokens), model.new_cache(3, 20)
        parts = [model(tokens[:, :7], cache=cache), model(tokens[:, 7:11], cache=cache)]  # a chunk on top of the past
        parts += [model(tokens[:, i : i + 1], cache=cache) for i in range(11, 20)]
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=1e-4, atol=1e-4)


def test_a_cache_taken_back_or_thinned_out_goes_on_as_if_it_had_always_been_so() -> None:
    model, tokens = small().eval(), ids(4, 12)
    with torch.inference_mode():
        cache = model.new_cache(4, 12)
        model(tokens[:, :8], cache=cache)
        model(ids(4, 2), cache=cache)  # drafted and refused
        cache.rewind(8)
        cache.select_rows(torch.tensor([1, 3]))
        after = model(tokens[[1, 3], 8:9], cache=cache)
        expected = model(tokens[[1, 3], :9])[:, -1:]
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4)
    assert (cache.batch, cache.length) == (2, 9)
    with pytest.raises(ValueError, match=r"length is 10; it must lie in \[0, 9\]"):
        cache.rewind(10)


def test_left_padding_is_invisible_in_the_forward_and_in_the_cache() -> None:
    model = small().eval()
    rows = [ids(3), ids(9), ids(6)]
    padded = torch.stack([F.pad(row, (9 - len(row), 0), value=5) for row in rows])
    mask = torch.stack([F.pad(torch.ones_like(row), (9 - len(row), 0)) for row in rows])
    extra = ids(3, 2)
    with torch.inference_mode():
        cache = model.new_cache(3, 11)
        got = [model(padded, attention_mask=mask)[:, -1], model(padded, attention_mask=mask, cache=cache)[:, -1]]
        got += [model(extra[:, i : i + 1], cache=cache)[:, -1] for i in range(2)]
        for i, row in enumerate(rows):
            alone = model(torch.cat((row, extra[i]))[None])[0]
            for logits, position in zip(got, (len(row) - 1, len(row) - 1, len(row), len(row) + 1)):
                torch.testing.assert_close(logits[i], alone[position], rtol=1e-4, atol=1e-4)


def test_what_padding_holds_changes_nothing_and_right_padding_is_as_good() -> None:
    model, row = small().eval(), ids(1, 6)
    mask = torch.tensor([[1] * 6 + [0] * 3])
    with torch.inference_mode():
        alone = model(row)
        for filler in (0, 60):
            right = model(F.pad(row, (0, 3), value=filler), attention_mask=mask)[:, :6]
            left = model(F.pad(row, (3, 0), value=filler), attention_mask=mask.flip(1))[:, 3:]
            torch.testing.assert_close(right, alone, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(left, alone, rtol=1e-4, atol=1e-4)


def test_no_query_is_left_without_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not every attention kernel turns an empty row of the softmax into zeros; one that makes NaN of it must do."""

    def plain(q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor, **_: Any) -> Tensor:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        return (q @ k.transpose(2, 3) / math.sqrt(q.shape[3])).masked_fill(~attn_mask, -math.inf).softmax(3) @ v

    model, tokens, mask = small(), ids(1, 6), torch.tensor([[0, 0, 1, 1, 1, 0]])
    expected = model(tokens, attention_mask=mask)
    monkeypatch.setattr(F, "scaled_dot_product_attention", plain)
    torch.testing.assert_close(model(tokens, attention_mask=mask), expected, rtol=1e-4, atol=1e-4)


def test_gradients_of_a_padded_batch_are_finite_and_those_of_its_rows() -> None:
    model, tokens = small(), ids(2, 8)
    mask = torch.ones(2, 8).long()
    mask[1, :5] = 0
    model(tokens, attention_mask=mask)[mask.bool()].square().sum().backward()
    padded = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    (model(tokens[:1]).square().sum() + model(tokens[1:, 5:]).square().sum()).backward()
    for got, wanted in zip(padded, (parameter.grad for parameter in model.parameters())):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)


def test_hidden_states_times_the_output_embedding_are_the_logits() -> None:
    for tied in (True, False):
        model, tokens = small(tie_embeddings=tied), ids(2, 5)
        hidden = model(tokens, return_hidden=True)
        assert hidden.shape == (2, 5, 32)
        assert torch.equal(F.linear(hidden, model.get_output_embeddings().weight), model(tokens))


def test_recomputing_blocks_from_outside_gives_the_same_gradients() -> None:
    model, tokens = small(dropout=0.2), ids(2, 16)
    again = copy.deepcopy(model)
    for block in again.blocks:
        block.forward = (lambda inner: lambda *args: checkpoint(inner, *args, use_reentrant=False))(block.forward)
    for candidate in (model, again):
        torch.manual_seed(1)
        candidate(tokens).square().mean().backward()
    for a, b in zip(model.parameters(), again.parameters()):
        assert torch.equal(a.grad, b.grad)


def test_compiles_into_one_graph_with_the_same_gradients() -> None:
    model, tokens = small(), ids(2, 16)
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    mask = torch.ones(2, 16).long()
    mask[0, :3] = 0
    for arguments in ({}, {"attention_mask": mask}, {"return_hidden": True}):
        torch.testing.assert_close(compiled(tokens, **arguments), model(tokens, **arguments))
    model(tokens).square().mean().backward()
    compiled(tokens).square().mean().backward()
    for a, b in zip(model.parameters(), compiled.parameters()):
        torch.testing.assert_close(a.grad, b.grad)


def test_rotary_angles_keep_neighbours_apart_in_a_bfloat16_model() -> None:
    model = small(max_seq_len=2048).bfloat16().eval()
    cos, _ = rotary_angles(torch.tensor([[1000, 1001]]), 8, 10000.0)
    assert cos.dtype == torch.float32 and cos[0, 0, 0, 0] == pytest.approx(math.cos(1000), abs=1e-5)
    assert not torch.equal(cos[:, :, 0], cos[:, :, 1])
    x = torch.randn(1, 1, 1, 8)
    turned = rotate(x, *rotary_angles(torch.tensor([[3]]), 8, 10000.0))
    torch.testing.assert_close(turned.norm(), x.norm())  # a rotation
    assert model(ids(1, 4)).dtype == torch.bfloat16


def test_state_dict_names_are_plain_and_no_tensor_appears_twice() -> None:
    tied, untied = small(), small(tie_embeddings=False)
    block = {f"blocks.{i}.{name}.weight" for i in (0, 1) for name in
             ("attention_norm", "attention.qkv", "attention.out", "mlp_norm", "mlp.gate_up", "mlp.down")}  # fmt: skip
    assert set(tied.state_dict()) == block | {"token_embedding.weight", "final_norm.weight"}
    assert set(untied.state_dict()) == set(tied.state_dict()) | {"head.weight"}
    pointers = [tensor.data_ptr() for tensor in tied.state_dict().values()]
    assert len(set(pointers)) == len(pointers)


def test_parameter_and_flop_counts_match_a_count_by_hand_and_by_torch() -> None:
    config = GPTConfig(vocab_size=50, num_layers=3, num_heads=2, hidden_size=16, intermediate_size=24, max_seq_len=64)
    model = GPT(config)
    block = 16 * 48 + 16 * 16 + 16 * 48 + 24 * 16
    assert model.num_parameters() == 50 * 16 + 3 * (block + 32) + 16
    assert model.num_parameters(non_embedding=True) == 3 * (block + 32) + 16
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(ids(1, 64) % 50).sum().backward()
    assert model.flops_per_token(64) == pytest.approx(counter.get_total_flops() / 64, rel=0.02)


def test_only_matrices_are_decayed_and_every_parameter_is_in_one_group() -> None:
    model = small(tie_embeddings=False)
    decayed, rest = model.parameter_groups(0.1)
    assert decayed["weight_decay"] == 0.1 and rest["weight_decay"] == 0.0
    assert all(p.dim() >= 2 for p in decayed["params"]) and all(p.dim() == 1 for p in rest["params"])
    assert {id(p) for p in decayed["params"] + rest["params"]} == {id(p) for p in model.parameters()}


def test_projections_into_the_residual_stream_start_smaller_by_depth() -> None:
    model = GPT(GPTConfig(vocab_size=64, num_layers=8, num_heads=4, hidden_size=256))
    block = model.blocks[0]
    assert block.mlp.down.weight.std().item() == pytest.approx(block.mlp.gate_up.weight.std().item() / 4, rel=0.05)
    assert block.attention.out.weight.std().item() == pytest.approx(math.sqrt(0.4 / 256) / 4, rel=0.05)


def test_a_config_survives_json_with_every_size_named() -> None:
    config = GPTConfig(vocab_size=10, num_heads=6, hidden_size=384)
    assert (config.num_kv_heads, config.intermediate_size, config.head_size) == (6, 1024, 64)
    assert GPTConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"num_layers": 1.5}, "num_layers is 1.5"),
        ({"num_heads": 5}, "num_heads is 5; it must divide hidden_size=32"),
        ({"num_heads": 32}, "heads of even size"),
        ({"num_kv_heads": 3}, "num_kv_heads is 3; it must divide num_heads=4"),
        ({"rope_theta": 0.0}, "rope_theta is 0.0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_an_impossible_shape_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_calls_beyond_the_context_or_the_cache_say_so() -> None:
    model = small()
    with pytest.raises(ValueError, match="reaches position 49; max_seq_len is 48"):
        model(ids(1, 49))
    with pytest.raises(ValueError, match=r"shape \(5,\); it must be \(batch, positions\)"):
        model(ids(5))
    with pytest.raises(ValueError, match=r"attention_mask has shape \(1, 4\)"):
        model(ids(1, 5), attention_mask=torch.ones(1, 4))
    with pytest.raises(ValueError, match="length=49"):
        model.new_cache(1, 49)
    with torch.inference_mode():
        cache = model.new_cache(2, 6)
        with pytest.raises(ValueError, match="needs 1 rows of 5"):
            model(ids(1, 5), cache=cache)
        with pytest.raises(ValueError, match="pads to the right"):
            model(ids(2, 3), cache=cache, attention_mask=torch.tensor([[1, 1, 0], [1, 1, 1]]))
        model(ids(2, 5), cache=cache)
        with pytest.raises(ValueError, match="first call only"):
            model(ids(2, 1), cache=cache, attention_mask=torch.ones(2, 1))
        with pytest.raises(ValueError, match="needs 2 rows of 7"):
            model(ids(2, 2), cache=cache)
