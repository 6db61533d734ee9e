"""AdamW's kernels and narrow moments: bit for bit the reference on any instruction set, thread count, sharding."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fasttrain.backend import CPP_PROBLEM, extension
from fasttrain.ops._adamw_moments import (
    MOMENTS,
    REMAINDER,
    SCALES,
    joined,
    keep,
    new_moments,
    random_bits,
    split,
    widened,
)
from fasttrain.ops.adamw import AdamW, Shard

needs_cpp = pytest.mark.skipif(bool(CPP_PROBLEM), reason=CPP_PROBLEM or "-")
ISAS = extension().available_isas() if not CPP_PROBLEM else []  # type: ignore[union-attr]
STATES = ("float32", "bfloat16", "int8")
pytestmark = pytest.mark.usefixtures("poisoned_memory")
SHAPES = ((), (1,), (255,), (257,), (3, 0), (70, 100), (4096,), (20000,), (33, 129))


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    module = extension()
    assert module is not None
    before = module.isa()
    module.set_isa(request.param)
    yield request.param
    module.set_isa(before)


def make(dtype: torch.dtype = torch.float32, shapes: Any = SHAPES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def set_gradients(parameters: list[nn.Parameter], seed: int) -> None:
    """Of very different sizes inside one block of 256, with zeros."""
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        size = 10.0 ** torch.randint(-9, 3, p.shape, generator=generator)
        zero = torch.rand(p.shape, generator=generator) < 0.1
        p.grad = (torch.randn(p.shape, generator=generator) * size).masked_fill(zero, 0.0).to(p.dtype)


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def assert_same_bits(one: AdamW, other: AdamW) -> None:
    for p, q in zip(one._parameters(), other._parameters()):
        assert torch.equal(bits(p), bits(q))
        assert one.state[p].keys() == other.state[q].keys()
        for key, value in one.state[p].items():
            assert torch.equal(bits(value), bits(other.state[q][key])), (tuple(p.shape), key)


@needs_cpp
@pytest.mark.parametrize("state_dtype", STATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ema_decay", [None, 0.9])
@pytest.mark.parametrize("master", [None, "remainder"])
def test_cpp_is_the_reference_bit_for_bit(
    isa: str, dtype: torch.dtype, state_dtype: str, ema_decay: float | None, master: str | None
) -> None:
    if master and dtype != torch.bfloat16:
        return  # as without
    optimizers = []
    for impl in ("cpp", "reference"):
        parameters = make(dtype)
        groups = [
            {"params": parameters[:4], "weight_decay": 0.3, "lr": 0.01},
            {"params": parameters[4:], "maximize": True},
        ]
        optimizers.append(
            AdamW(
                groups,
                lr=0.1,
                betas=(0.8, 0.99),
                ema_decay=ema_decay,
                state_dtype=state_dtype,
                master=master,
                impl=impl,  # type: ignore[arg-type]
            )
        )
        optimizers[-1].rounding_seed = (7 << 32) + 5
    for step in range(4):
        for optimizer in optimizers:
            set_gradients(list(optimizer._parameters()), seed=step)
            optimizer.step(grad_scale=0.37)
        assert_same_bits(*optimizers)
    moved = [p for p in optimizers[0]._parameters() if p.numel()]
    assert all(not torch.equal(p, q) for p, q in zip(moved, (p for p in make(dtype) if p.numel())))


# Of a block of 256 gradients of about one size, which takes the fastest path, one is something else. The first moment's
# codes reach down to 1.125 * 2^-15 / 1.6 of a block of ones; a little less can be rounded up to the lowest code.
ODD_ONES_OUT = {"none": 1.0, "tiny": 0.9 * 1.125 / 1.6 * 2.0**-15, "negative": -1.0, "zero": 0.0, "huge": 3e19}
ODD_ONES_OUT |= {"infinite": float("inf"), "nan": float("nan")}


@needs_cpp
@pytest.mark.parametrize("odd_one", ODD_ONES_OUT)
@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8"])
def test_cpp_is_the_reference_where_one_gradient_is_not_like_the_rest(isa: str, state_dtype: str, odd_one: str) -> None:
    generator = torch.Generator().manual_seed(2)
    blocks = 100
    places = torch.randint(256, (blocks,), generator=generator)  # (blocks,)
    optimizers = [
        AdamW(make(shapes=((blocks, 256), (5000,))), lr=0.1, state_dtype=state_dtype, impl=impl)
        for impl in ("cpp", "reference")  # type: ignore[arg-type]
    ]
    for step in range(3):
        usual = torch.ones(blocks, 256) if step == 0 else torch.randn(blocks, 256, generator=generator)
        usual[torch.arange(blocks), places] = ODD_ONES_OUT[odd_one]
        last = torch.randn(5000, generator=generator)
        for optimizer in optimizers:
            for p, gradient in zip(optimizer._parameters(), (usual, last)):
                p.grad = gradient.clone()
            optimizer.step()
        for p, q in zip(optimizers[0]._parameters(), optimizers[1]._parameters()):
            pairs = [(p, q), *((value, optimizers[1].state[q][key]) for key, value in optimizers[0].state[p].items())]
            for one, other in pairs:  # NaN has many bit patterns
                torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@needs_cpp
@pytest.mark.parametrize("state_dtype", STATES)
def test_threads_do_not_change_a_bit_of_norm_or_update(state_dtype: str) -> None:
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            parameters = make(shapes=((300, 300), (50,), (40000,)))
            optimizer = AdamW(parameters, max_grad_norm=0.1, state_dtype=state_dtype, impl="cpp")
            for seed in range(2):
                set_gradients(parameters, seed)
                optimizer.step()
            results.append(optimizer)
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert torch.equal(bits(results[0].grad_norm), bits(other.grad_norm))
        assert_same_bits(results[0], other)


@needs_cpp
def test_the_norm_is_right_and_the_same_on_every_instruction_set() -> None:
    module = extension()
    assert module is not None
    grads = [
        torch.randn(40001),
        torch.randn(7, 5),
        torch.empty(0),
        torch.randn(300).bfloat16(),
        torch.randn(16384) * 1e3,
    ]
    want = torch.cat([grad.double().flatten() for grad in grads]).norm().float()
    before, got = module.isa(), []
    for name in ISAS:
        module.set_isa(name)
        got.append(torch.ops.fasttrain.adamw_norm(grads))
        assert torch.ops.fasttrain.adamw_norm([torch.full((3,), 1e30)]) == pytest.approx(3**0.5 * 1e30)  # 1e60 fits
        assert torch.ops.fasttrain.adamw_norm([torch.full((3,), 3e38)]).isinf()
        for poison in (float("nan"), float("inf")):
            assert not torch.ops.fasttrain.adamw_norm([torch.zeros(40), torch.tensor([0.0] * 19 + [poison])]).isfinite()
    module.set_isa(before)
    torch.testing.assert_close(got[0], want, rtol=2e-7, atol=0)
    assert all(torch.equal(bits(one), bits(got[0])) for one in got)


@needs_cpp
@pytest.mark.parametrize("state_dtype", STATES)
@pytest.mark.parametrize("found_inf", [0.0, 1.0])
@pytest.mark.parametrize("host_devices", [("cpu",), ()], ids=["verdict on the host", "verdict on the device"])
def test_gradients_are_zeroed_on_request_whether_or_not_the_step_is_skipped(
    state_dtype: str, found_inf: float, host_devices: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fasttrain.utils._HOST_DEVICES", host_devices)
    for impl in ("cpp", "reference"):
        parameters = make()
        parameters[5].grad = torch.randn(100, 70).t()  # served by the reference
        optimizer = AdamW(parameters, state_dtype=state_dtype, impl=impl)
        set_gradients(parameters[:5] + parameters[6:], seed=0)
        kept = [p.grad for p in parameters]
        optimizer.step(found_inf=found_inf)
        assert all(grad is not None and grad.any() for grad in kept if grad.numel() > 1)
        optimizer.step(found_inf=found_inf, zero_grads=True)
        for p, grad in zip(parameters, kept):
            assert p.grad is grad and not grad.any()
            assert float(optimizer.state[p]["step"]) == (0 if found_inf else 2)


@needs_cpp
def test_layouts_that_the_kernel_cannot_walk_are_served_beside_those_it_can() -> None:
    """torch 2.13's fused CPU kernel is 0.2 wrong here."""
    values, gradients = torch.randn(4, 60, 80), torch.randn(4, 60, 80)
    plain = [nn.Parameter(values[i].clone()) for i in range(4)]
    odd = [
        nn.Parameter(values[0].clone()),
        nn.Parameter(values[1].t().contiguous().t()),
        nn.Parameter(values[2].clone()),
        nn.Parameter(torch.stack([values[3], values[3]], dim=2)[..., 0]),
    ]
    for i in range(4):
        plain[i].grad, odd[i].grad = gradients[i].clone(), gradients[i].clone()
    odd[0].grad = gradients[0].t().contiguous().t()
    odd[2].grad = torch.stack([gradients[2], gradients[2]], dim=2)[..., 0]
    assert not any(p.is_contiguous() and p.grad.is_contiguous() for p in odd[:3:2])  # type: ignore[union-attr]
    for state_dtype in STATES:
        ours, theirs = copy.deepcopy(odd), copy.deepcopy(plain)
        for p, q in zip(ours + theirs, odd + plain):
            p.grad = q.grad
        for parameters in (ours, theirs):
            AdamW(parameters, lr=0.1, max_grad_norm=1.0, state_dtype=state_dtype).step()
        for one, other in zip(ours, theirs):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_random_bits_are_philox_of_seed_step_parameter_and_element() -> None:
    """Against the published algorithm in Python's own integers, whose 10-round form has a published answer."""

    def philox(counter: list[int], key: list[int], rounds: int) -> list[int]:
        (a, b, c, d), (k, l) = counter, key
        for _ in range(rounds):
            p, q = a * 0xD2511F53, c * 0xCD9E8D57
            a, b, c, d = (q >> 32) ^ b ^ k, q % 2**32, (p >> 32) ^ d ^ l, p % 2**32
            k, l = (k + 0x9E3779B9) % 2**32, (l + 0xBB67AE85) % 2**32
        return [a, b, c, d]

    assert philox([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0], 10) == [
        0xD16CFE09,
        0x94FDCCEB,
        0x5001E420,
        0x24126EA1,
    ]
    arguments: dict[str, Any] = {"seed": (3 << 32) + 9, "step": 12, "parameter": 5, "offset": (1 << 40) + 256}
    for num_bits in (16, 20):
        noises = random_bits(num_bits, torch.Size([700]), **{**arguments, "step": torch.tensor(12.0)})
        for i in (0, 1, 7, 8, 31, 32, 33, 63, 64, 255, 699):
            element = (1 << 40) + 256 + i
            counter = element // 64 * 8 + element % 8
            word = philox([counter % 2**32, counter >> 32, 12, 5], [9, 3], 7)[element // 8 % 4]
            lowest_and_highest = [word % 2**num_bits, word >> 32 - num_bits]
            assert [int(noise[i]) for noise in noises] == lowest_and_highest[:: -1 if element % 64 >= 32 else 1]
        for other in ({"seed": 1}, {"step": 11}, {"parameter": 6}, {"offset": 0}):
            changed = random_bits(num_bits, torch.Size([700]), **{**arguments, **other})
            assert all((one == another).float().mean() < 0.05 for one, another in zip(noises, changed))


def test_the_moments_of_an_element_and_those_of_its_neighbours_round_independently() -> None:
    m, v = (noise.double() / 2**20 for noise in random_bits(20, torch.Size([1 << 18]), seed=3, step=7, parameter=1))
    apart = [(noise[n:], noise[:-n]) for noise in (m, v) for n in (1, 8, 31, 32, 33, 64)]
    for one, other in [(m, v), *apart]:
        z = float(torch.corrcoef(torch.stack([one, other]))[0, 1]) * len(one) ** 0.5
        assert abs(z) < 5
    assert all(abs(float(noise.mean()) - 0.5) < 5 / (12 * len(noise)) ** 0.5 for noise in (m, v))


def coded(m: Tensor, v: Tensor, seed: int = 0) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    state = {"step": torch.tensor(1.0), **new_moments(m, "int8", 1 << 20)}
    keep(state, m, v, seed=seed, parameter=0)
    return state, *widened(state)


def test_eight_bit_codes_hold_three_bits_of_mantissa_and_are_unbiased() -> None:
    generator = torch.Generator().manual_seed(0)
    m = torch.randn(1000, generator=generator) * 10.0 ** torch.randint(-3, 1, (1000,), generator=generator)
    m = m.clamp(-3.7, 3.7)
    v = (m * 10.0 ** torch.randint(-2, 1, (1000,), generator=generator)).square().clamp(max=11.0)
    m[::256], v[::256] = 3.7, 11.0  # the exponents of the blocks' scales are 1 and 3
    draws = [coded(m, v, seed)[1:] for seed in range(400)]
    for wide, which in ((m, 0), (v, 1)):
        values = torch.stack([draw[which] for draw in draws])
        step = 2.0 ** torch.floor(torch.log2(wide.abs())) / 8
        lowest = 1.125 * 2.0 ** (1 - 15 if which == 0 else 3 - 31)
        above = wide.abs() >= lowest
        assert 0.8 < above.float().mean() < 1  # both ranges are there
        spread = torch.where(above, step, torch.tensor(lowest))
        assert ((values - wide).abs() <= spread * (1 + 1e-5)).all()
        z = ((values.double().mean(0) - wide) / (spread / 2 / 400**0.5))[above if which else slice(None)]
        assert z.abs().max() < 5 and abs(float(z.mean())) < 5 / 1000**0.5


def test_eight_bit_codes_at_the_edges() -> None:
    tiny, huge = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    for scale in (0.0, 1e-45, tiny, 1e-20, 1.0, 1e30, huge / 8):
        m = torch.linspace(-7, 7, 300) * scale
        state, wide_m, wide_v = coded(m, m.abs())
        assert torch.isfinite(wide_m).all() and torch.isfinite(wide_v).all()
        assert (wide_m[m == 0] == 0).all() and (wide_v[m == 0] == 0).all()
        assert (wide_v[m != 0] > 0).all()
        assert ((wide_v - m.abs()).abs() <= m.abs() / 7.9 + 4 * 2.0**-149 * 2**18).all()
        assert state[SCALES].shape == (2, 2)
    # A v that is not zero never becomes zero, however small beside its block's largest, or m / eps would be the step.
    v = torch.full((256,), 1e-30)
    v[0] = 1.0
    assert (coded(v.sqrt(), v)[2] > 0).all()
    m = torch.ones(256)
    m[3], m[4] = float("nan"), float("inf")
    assert coded(m, m)[1][3].isnan() and coded(m, m)[1][4] == float("inf") and not coded(m, m)[1][5:].isnan().any()


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_narrowing_what_was_widened_changes_nothing(impl: str) -> None:
    parameters = make()
    optimizer = AdamW(parameters, state_dtype="int8", impl=impl)  # type: ignore[arg-type]
    for seed in range(3):
        set_gradients(parameters, seed)
        optimizer.step()
    saved = optimizer.state_dict()
    other = AdamW(make(), state_dtype="int8", impl=impl)  # type: ignore[arg-type]
    other.load_state_dict(copy.deepcopy(saved))
    again = other.state_dict()
    for index, entry in saved["state"].items():
        assert set(entry) == {"step", *MOMENTS}
        for key, value in entry.items():
            assert value.dtype == torch.float32 and torch.equal(bits(value), bits(again["state"][index][key]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("state_dtype", STATES)
def test_a_reload_in_the_middle_changes_no_bit_of_what_follows(state_dtype: str, dtype: torch.dtype) -> None:
    runs = []
    for reload in (False, True):
        parameters = make(dtype)
        optimizer = AdamW(parameters, max_grad_norm=1.0, state_dtype=state_dtype, ema_decay=0.9)
        for seed in range(6):
            if reload and seed == 3:
                saved = copy.deepcopy(optimizer.state_dict())
                optimizer = AdamW(parameters, max_grad_norm=1.0, state_dtype=state_dtype, ema_decay=0.9)
                optimizer.load_state_dict(saved)
            set_gradients(parameters, seed)
            optimizer.step()
        runs.append(optimizer)
    for p, q in zip(runs[0]._parameters(), runs[1]._parameters()):
        assert torch.equal(bits(p), bits(q))
        for one, other in zip(widened(runs[0].state[p]), widened(runs[1].state[q])):
            assert torch.equal(bits(one), bits(other))


def test_eight_bit_state_moves_to_torchs_adamw_and_back() -> None:
    ours, theirs = make(), make()
    optimizer = AdamW(ours, lr=0.01, state_dtype="int8")
    set_gradients(ours, 0)
    optimizer.step()
    torchs = torch.optim.AdamW(theirs, lr=0.01)
    torchs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p, q in zip(ours, theirs):
        q.data.copy_(p.data)
        for key, value in zip(MOMENTS, widened(optimizer.state[p])):
            assert torch.equal(torchs.state[q][key], value)
    for parameters, one in ((ours, optimizer), (theirs, torchs)):
        set_gradients(parameters, 1)
        one.step()
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)  # rounding comes after the update
    optimizer.load_state_dict(torchs.state_dict())
    assert optimizer.state[ours[5]]["exp_avg"].dtype == torch.uint8
    assert optimizer.state[ours[0]]["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("state_dtype", STATES)
def test_a_parameter_in_shards_is_rounded_as_the_whole(state_dtype: str, impl: Any) -> None:
    whole = make(shapes=((5000,),))
    parts = [nn.Parameter(whole[0].detach()[begin:end].clone()) for begin, end in ((0, 2560), (2560, 5000))]
    optimizers = [AdamW(whole, state_dtype=state_dtype, impl=impl)]
    for part, offset in zip(parts, (0, 2560)):
        optimizers.append(AdamW([part], state_dtype=state_dtype, impl=impl))
        optimizers[-1].shards[part] = Shard(offset, 5000)  # 2440 elements alone would not be compressed
    for seed in range(3):
        set_gradients(whole, seed)
        assert whole[0].grad is not None
        parts[0].grad, parts[1].grad = whole[0].grad[:2560].clone(), whole[0].grad[2560:].clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(torch.cat(parts), whole[0])  # type: ignore[arg-type]
    for key in MOMENTS:
        joined = torch.cat([optimizer.state[part][key] for optimizer, part in zip(optimizers[1:], parts)])
        assert torch.equal(joined, optimizers[0].state[whole[0]][key])


def test_what_is_kept_costs_what_was_promised() -> None:
    for state_dtype, expected in (("float32", 8.0), ("bfloat16", 4.0), ("int8", 2.0 + 8 / 256)):
        p = nn.Parameter(torch.randn(256, 256))
        p.grad = torch.randn_like(p)
        optimizer = AdamW([p], state_dtype=state_dtype)
        optimizer.step()
        kept = sum(value.nbytes for key, value in optimizer.state[p].items() if key != "step")
        assert kept == expected * p.numel()


def test_options_of_torch_that_used_to_be_refused() -> None:
    ours, theirs = make(), make()
    options: dict[str, Any] = {"lr": torch.tensor(0.05), "weight_decay": 0.1}
    groups = [
        [{"params": parameters[:3], "maximize": True}, {"params": parameters[3:]}] for parameters in (ours, theirs)
    ]
    one, other = AdamW(groups[0], **options), torch.optim.AdamW(groups[1], foreach=False, **options)
    for seed in range(3):
        for parameters, optimizer in ((ours, one), (theirs, other)):
            set_gradients(parameters, seed)
            optimizer.step()
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)
    other.load_state_dict(one.state_dict())
    one.load_state_dict(other.state_dict())
    assert one.param_groups[0]["maximize"] and not one.param_groups[1]["maximize"]


def test_the_trainers_optimizer_keeps_what_the_config_asks_for() -> None:
    from fasttrain.assembly import build_optimizer
    from fasttrain.config import TrainConfig

    model = nn.Linear(128, 64)
    optimizer = build_optimizer(model, TrainConfig(optimizer_state_dtype="int8", seed=9))
    model(torch.randn(3, 128)).sum().backward()
    optimizer.step(grad_scale=1.0)
    assert optimizer.state[model.weight]["exp_avg"].dtype == torch.uint8 and optimizer.rounding_seed == 9


def final_loss(state_dtype: str, seed: int) -> float:
    """A small network on a fixed task; the seed draws its initial weights and the order of the data."""
    generator = torch.Generator().manual_seed(1000)
    x = torch.randn(512, 32, generator=generator)
    y = torch.tanh(x @ torch.randn(32, 8, generator=generator)) + 0.1 * torch.randn(512, 8, generator=generator)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 8))
    optimizer = AdamW(model.parameters(), lr=3e-3, state_dtype=state_dtype, max_grad_norm=1.0)
    for step in range(150):
        rows = torch.randint(0, 512, (64,))
        nn.functional.mse_loss(model(x[rows]), y[rows]).backward()
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / 150)
        optimizer.step(zero_grads=True)
    return float(nn.functional.mse_loss(model(x), y).detach())


def test_narrow_moments_reach_the_loss_of_wide_ones_within_the_spread_of_seeds() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    losses = {state_dtype: torch.tensor([final_loss(state_dtype, seed) for seed in range(8)]) for state_dtype in STATES}
    torch.set_num_threads(threads)
    wide = losses["float32"]
    for state_dtype in STATES[1:]:
        assert (losses[state_dtype].mean() - wide.mean()).abs() < wide.std(), losses


def test_a_master_is_its_parameter_and_its_remainder() -> None:
    """Every upper half with lower halves around the tie and at the ends, all lower halves of some upper ones."""
    low = torch.tensor([0, 1, 2, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xFFFE, 0xFFFF])
    some = torch.tensor([0, 1, 0x3F80, 0x3F81, 0x7F7F, 0x7F80, 0x8000, 0xBF80, 0xFF7F])
    halves = torch.arange(1 << 16)
    patterns = torch.cat([(halves[:, None] * 65536 + low).flatten(), (some[:, None] * 65536 + halves).flatten()])
    master = patterns.to(torch.int32).view(torch.float32)
    p, remainder = split(master)
    finite = ~master.isnan()
    assert torch.equal(bits(joined(p, remainder)[finite]), bits(master[finite]))
    assert joined(p, remainder)[~finite].isnan().all() and p[~finite].isnan().all() and not p[finite].isnan().any()
    tie = (patterns & 0xFFFF) == 0x8000
    assert torch.equal(bits(p[finite & ~tie]), bits(master[finite & ~tie].bfloat16()))
    assert (p[finite & tie].double().abs() >= master[finite & tie].double().abs()).all()


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("state_dtype", STATES)
def test_bfloat16_parameters_with_a_remainder_run_as_float32_ones(state_dtype: str, impl: Any) -> None:
    """Bit for bit, through a reload by way of state_dict; without the remainder they go elsewhere."""
    narrow, lost = make(torch.bfloat16), make(torch.bfloat16)
    wide = [nn.Parameter(p.detach().float()) for p in narrow]
    options: dict[str, Any] = {"lr": 1e-3, "state_dtype": state_dtype, "max_grad_norm": 5.0, "impl": impl}
    ours = AdamW(narrow, master="remainder", **options)
    others = [AdamW(wide, **options), AdamW(lost, **options)]
    for seed in range(5):
        if seed == 2:
            saved = copy.deepcopy(ours.state_dict())
            ours = AdamW(narrow, master="remainder", **options)
            ours.load_state_dict(saved)
        set_gradients(narrow, seed)
        for p, q, r in zip(narrow, wide, lost):
            assert p.grad is not None
            q.grad, r.grad = p.grad.float(), p.grad.clone()
        for optimizer in (ours, *others):
            optimizer.step(grad_scale=0.5)
    for p, q in zip(narrow, wide):
        assert torch.equal(bits(joined(p, ours.state[p][REMAINDER])), bits(q))
        assert torch.equal(bits(p), bits(split(q)[0]))
    assert any(not torch.equal(p, r) for p, r in zip(narrow, lost))


def test_a_remainder_moves_to_torchs_adamw_and_back() -> None:
    ours, theirs = make(torch.bfloat16), make(torch.bfloat16)
    optimizer, torchs = AdamW(ours, master="remainder"), torch.optim.AdamW(theirs)
    set_gradients(ours, 0)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    torchs.load_state_dict(saved)
    set_gradients(theirs, 1)
    torchs.step()
    assert any(state[REMAINDER].any() for state in optimizer.state.values())
    optimizer.load_state_dict(torchs.state_dict())  # what torch cast to bfloat16 is no remainder any more
    assert not any(state[REMAINDER].any() for state in optimizer.state.values())
    optimizer.load_state_dict(saved)
    assert any(state[REMAINDER].any() for state in optimizer.state.values())
    without = AdamW(ours)
    without.load_state_dict(saved)
    assert not any(REMAINDER in state for state in without.state.values())
    with pytest.raises(ValueError, match=r"master is 'float32'; it must be 'remainder', or None"):
        AdamW(ours, master="float32")


@needs_cpp
def test_the_ops_tell_the_truth_about_what_they_write() -> None:
    p, g = torch.randn(3000), torch.randn(3000)
    m, v, step = torch.zeros(3000), torch.zeros(3000), torch.zeros(())
    terms, places = (
        torch.tensor([[0.1, 0.9, 0.99, 1e-8, 0.1, 1.0, 0.0]], dtype=torch.float64),
        torch.zeros(1, 3, dtype=torch.int64),
    )
    torch.library.opcheck(torch.ops.fasttrain.adamw_norm, ([g, p],))
    torch.library.opcheck(
        torch.ops.fasttrain.adamw_update,
        ([p], [g], [m], [v], [torch.empty(0)], [step], [], [], terms, places, torch.ones(()), None, 0, True),
    )


@needs_cpp
def test_wrong_tensors_are_refused_before_anything_is_written() -> None:
    p, g, m, v, step = torch.randn(300), torch.randn(300), torch.zeros(300), torch.zeros(300), torch.zeros(())
    terms, places = (
        torch.tensor([[0.1, 0.9, 0.99, 1e-8, 0.1, 1.0, 0.0]], dtype=torch.float64),
        torch.zeros(1, 3, dtype=torch.int64),
    )
    good = [[p], [g], [m], [v], [torch.empty(0)], [step], [], [], terms, places, None, None, 0, False]
    before = p.clone()
    for position, bad in (
        (0, [p[::2]]),
        (1, [g.double()]),
        (2, [m, m]),
        (3, [v[:200]]),
        (4, []),
        (5, [step.long()]),
        (6, [torch.zeros(299)]),
        (7, [torch.zeros(300, dtype=torch.int16)]),
        (8, terms[:, :6]),
        (9, places + 1),
        (10, torch.ones(2)),
    ):
        arguments = [*good[:position], bad, *good[position + 1 :]]
        with pytest.raises(RuntimeError):
            torch.ops.fasttrain.adamw_update(*arguments)
    with pytest.raises(RuntimeError):
        torch.ops.fasttrain.adamw_norm([])
    assert torch.equal(p, before) and step == 0


@needs_cpp
@pytest.mark.slow
def test_the_norm_of_more_than_two_to_the_31_elements(tmp_path: Any) -> None:
    """Of a sparse file whose only values lie beyond what 32 bits count."""
    numel = 2**31 + 100
    grad = torch.from_file(str(tmp_path / "sparse"), shared=True, size=numel, dtype=torch.bfloat16)
    grad[-1], grad[2**31 + 3] = 3.0, 4.0
    assert torch.ops.fasttrain.adamw_norm([grad]) == 5.0
