"""What every rank of a gloo group does to test vocab_parallel: `test_vocab_parallel.py` starts it, reads its verdicts.

    python vocab_parallel_ranks.py DIRECTORY

forks groups of 2 and 3 ranks. Each runs every function below whose name starts with `check_`, in their order, and
writes {name: traceback, or ""} to DIRECTORY/WORLD-RANK.json. The truth is one process with all the logits, in float64.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import multiprocessing
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fasttrain import vocab_parallel, vocab_shards
from fasttrain.backend import CPP_PROBLEM
from fasttrain.ops.cross_entropy import Terms, cross_entropy_reference
from fasttrain.ops.linear_cross_entropy import linear_cross_entropy_reference

WORLDS = (2, 3)
IMPLS = ("reference",) if CPP_PROBLEM else ("reference", "cpp")
OPTIONS: list[dict[str, Any]] = [
    {},
    {"label_smoothing": 0.2, "z_loss": 1e-3, "softcap": 3.0},
    {"ignore_index": 1, "label_smoothing": 1.0},
]


def cut(classes: int) -> list[int]:
    """Sizes of the shards: uneven, and the second one empty where there are three."""
    world = dist.get_world_size()
    first = classes // 3
    return [first, classes - first] if world == 2 else [first, 0, classes - first]


def mine(whole: Tensor, sizes: list[int], dim: int = 0) -> Tensor:
    rank = dist.get_rank()
    return whole.narrow(dim, sum(sizes[:rank]), sizes[rank]).clone()


def problem(N: int, D: int, V: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, bias, targets: on both ends of every shard, every third row without one."""
    generator = torch.Generator().manual_seed(N + D + V)
    hidden, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((N, D), (V, D), (V,)))
    targets = torch.randint(0, V, (N,), generator=generator)
    for row, edge in enumerate((0, V - 1, V // 3, max(V // 3 - 1, 0))):
        targets[row : row + 1] = edge
    targets[4::3] = -100
    return hidden.to(dtype), (weight * 4 / D**0.5).to(dtype), bias.to(dtype), targets


def reference(tensors: Any, targets: Tensor, upstream: Any, options: dict[str, Any], reduction: Any) -> list[Any]:
    """Loss and gradients of the whole problem."""
    leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in tensors]
    terms = Terms(options.get("ignore_index", -100), options.get("label_smoothing", 0.0), options.get("z_loss", 0.0),
                  options.get("softcap", 0.0))  # fmt: skip
    if len(leaves) == 1:
        loss = cross_entropy_reference(leaves[0], targets, terms, reduction)
    else:
        loss = linear_cross_entropy_reference(leaves[0], leaves[1], targets, leaves[2], terms, reduction)
    (loss * upstream).sum().backward()
    return [loss.detach(), *(None if leaf is None else leaf.grad for leaf in leaves)]


def assert_close(got: list[Any], tensors: Any, targets: Tensor, upstream: Any, options: dict[str, Any], reduction: Any,
                 parts: list[Any]) -> None:  # fmt: skip
    """`got` is as exact as plain PyTorch; `parts` cut the truth's gradients to this rank's."""
    plain = reference(tensors, targets, upstream, options, reduction)
    doubled = [None if tensor is None else tensor.double() for tensor in tensors]
    truth = reference(doubled, targets, upstream, options, reduction)
    for ours, theirs, exact, part in zip(got, plain, truth, [lambda x: x, *parts]):
        if exact is None:
            assert ours is None
            continue
        whole = exact
        theirs, exact = part(theirs), part(exact)
        assert ours.dtype == theirs.dtype and ours.shape == exact.shape
        unit = torch.finfo(ours.dtype).eps / 2
        # Each rank rounds its part of hidden's gradient: one more rounding for each.
        largest = whole.abs().max() if whole.numel() else whole.new_zeros(())
        allowed = 4 * (theirs.double() - exact).abs().max() + 8 * unit * largest if exact.numel() else 0
        error = (ours.double() - exact).abs().max() if exact.numel() else 0
        assert error <= allowed + 1e-7 * float(1e-12 < unit < 1e-6), f"error {error:.3g} against {allowed:.3g}"


def run_logits(logits: Tensor, targets: Tensor, sizes: list[int], upstream: Any, **options: Any) -> list[Tensor]:
    leaf = mine(logits, sizes, 1).requires_grad_()
    loss = vocab_parallel.cross_entropy(leaf, targets, vocab_size=sum(sizes), **options)
    (loss * upstream).sum().backward()
    assert leaf.grad is not None
    return [loss.detach(), leaf.grad]


def run_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, sizes: list[int], upstream: Any,
               **options: Any) -> list[Any]:  # fmt: skip
    leaves = [hidden.clone(), mine(weight, sizes), None if bias is None else mine(bias, sizes)]
    h, w, b = (None if leaf is None else leaf.requires_grad_() for leaf in leaves)
    assert h is not None and w is not None
    loss = vocab_parallel.linear_cross_entropy(h, w, targets, bias=b, vocab_size=sum(sizes), **options)
    (loss * upstream).sum().backward()
    return [loss.detach(), h.grad, w.grad, None if b is None else b.grad]


def check_losses_and_gradients_are_as_exact_as_one_process() -> None:
    for impl in IMPLS:
        for options in OPTIONS:
            for reduction in ("mean", "sum", "none"):
                for N, D, V in [(5, 3, 3), (33, 16, 67)]:
                    hidden, weight, bias, targets = problem(N, D, V)
                    targets[targets == -100] = options.get("ignore_index", -100)
                    upstream = torch.linspace(-1, 2, N) if reduction == "none" else 0.37
                    sizes, given = cut(V), {**options, "reduction": reduction, "impl": impl}
                    got = run_linear(hidden, weight, bias, targets, sizes, upstream, **given)
                    parts: list[Any] = [lambda x: x, lambda x: mine(x, sizes), lambda x: mine(x, sizes)]  # noqa: B023
                    assert_close(got, (hidden, weight, bias), targets, upstream, options, reduction, parts)
                    logits = hidden @ weight.t()
                    got = run_logits(logits, targets, sizes, upstream, **given)
                    assert_close(got, (logits,), targets, upstream, options, reduction,
                                 [lambda x: mine(x, sizes, 1)])  # fmt: skip  # noqa: B023


def check_every_type_and_size_is_as_exact_as_one_process() -> None:
    for N, D, V, dtype in [(1, 1, 1, torch.float32), (9, 4, 2, torch.float64), (20, 40, 4099, torch.float32),
                           (20, 40, 1003, torch.bfloat16), (20, 8, 300, torch.float16)]:  # fmt: skip
        hidden, weight, _, targets = problem(N, D, V, dtype)
        sizes = cut(V)
        got = run_linear(hidden, weight, None, targets, sizes, 1.0)
        assert_close(got, (hidden, weight, None), targets, 1.0, {}, "mean",
                     [lambda x: x, lambda x: mine(x, sizes), None])  # fmt: skip  # noqa: B023
        logits = hidden @ weight.t()
        got = run_logits(logits, targets, sizes, 1.0)
        assert_close(got, (logits,), targets, 1.0, {}, "mean", [lambda x: mine(x, sizes, 1)])  # noqa: B023


def check_every_rank_gets_the_same_loss_and_gradient_of_hidden() -> None:
    hidden, weight, bias, targets = problem(40, 16, 103)
    for found in run_linear(hidden, weight, bias, targets, cut(103), 0.7)[:2]:
        others = [torch.empty_like(found) for _ in range(dist.get_world_size())]
        dist.all_gather(others, found)
        assert all(torch.equal(other, found) for other in others)


def check_derivatives_agree_with_finite_differences() -> None:
    class Cut(torch.autograd.Function):
        """A whole tensor's shard; the gradients of all shards together are the whole's."""

        @staticmethod
        def forward(ctx: Any, whole: Tensor, sizes: list[int]) -> Tensor:
            ctx.sizes, ctx.shape = sizes, whole.shape
            return mine(whole, sizes)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            whole, rank = grads[0].new_zeros(ctx.shape), dist.get_rank()
            whole.narrow(0, sum(ctx.sizes[:rank]), ctx.sizes[rank]).copy_(grads[0])
            dist.all_reduce(whole)
            return whole, None

    hidden, weight, bias, targets = problem(3, 2, 4, torch.float64)
    targets[1] = -100
    sizes = cut(4)
    for reduction in ("none", "mean"):

        def losses(h: Tensor, w: Tensor, b: Tensor, reduction: Any = reduction) -> Tensor:
            options = {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 4.0, "reduction": reduction, "vocab_size": 4}
            w, b = Cut.apply(w, sizes), Cut.apply(b, sizes)  # type: ignore[no-untyped-call]
            return vocab_parallel.linear_cross_entropy(h, w, targets, bias=b, **options)

        leaves = [tensor.requires_grad_() for tensor in (hidden.clone(), weight.clone(), bias.clone())]
        assert torch.autograd.gradcheck(losses, leaves)


def check_a_second_backward_and_no_backward_give_the_same() -> None:
    hidden, weight, bias, targets = problem(23, 8, 31)
    h, w, b = (t.requires_grad_() for t in (hidden.clone(), mine(weight, cut(31)), mine(bias, cut(31))))
    loss = vocab_parallel.linear_cross_entropy(h, w, targets, bias=b, vocab_size=31)
    first = torch.autograd.grad(loss * 0.5, (h, w, b), retain_graph=True)
    for once, again in zip(first, torch.autograd.grad(loss * 0.5, (h, w, b))):
        torch.testing.assert_close(once, again)
    with torch.no_grad():
        again = vocab_parallel.linear_cross_entropy(h, w, targets, bias=b, vocab_size=31)
        torch.testing.assert_close(again, loss.detach())
    only_weight = vocab_parallel.linear_cross_entropy(hidden, w, targets, bias=b, vocab_size=31)
    torch.testing.assert_close(torch.autograd.grad(only_weight * 0.5, w)[0], first[1])


def check_rows_without_targets_and_no_rows_at_all() -> None:
    hidden, weight, bias, _ = problem(6, 4, 9)
    for reduction, want in (("mean", torch.nan), ("sum", 0.0)):
        for rows in (6, 0):
            ignored = torch.full((rows,), -100)
            loss, grad_hidden, grad_weight, grad_bias = run_linear(
                hidden[:rows], weight, bias, ignored, cut(9), 1.0, reduction=reduction)  # fmt: skip
            torch.testing.assert_close(loss, torch.tensor(want), equal_nan=True)
            assert not grad_hidden.any() and not grad_weight.any() and not grad_bias.any()
            loss, gradient = run_logits((hidden @ weight.t())[:rows], ignored, cut(9), 1.0, reduction=reduction)
            torch.testing.assert_close(loss, torch.tensor(want), equal_nan=True)
            assert not gradient.any()


def check_logits_of_any_size_are_summed_without_overflow() -> None:
    for scale in (1e3, 1e5, -1e5):
        logits = torch.randn(5, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        logits = logits + torch.tensor([0.0, scale, scale, scale / 2, -scale], dtype=torch.float64)[:, None]
        targets = torch.tensor([0, 3, 4, 11, 7])
        got = run_logits(logits, targets, cut(12), 1.0, reduction="none")
        want = reference((logits,), targets, 1.0, {}, "none")
        torch.testing.assert_close(got[0], want[0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(got[1], mine(want[1], cut(12), 1), rtol=1e-9, atol=1e-12)


def check_nan_and_masked_rows_spoil_no_other() -> None:
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(1))
    logits[0, : cut(9)[0]] = -torch.inf  # all of the first shard
    logits[1, 2], logits[2] = torch.nan, -torch.inf
    targets = torch.tensor([8, 0, 1, 5])
    losses, _ = run_logits(logits, targets, cut(9), torch.ones(4), reduction="none")
    want = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(losses, want, equal_nan=True)
    assert losses.isnan().tolist() == [False, True, True, False]


@contextlib.contextmanager
def counted_bytes(*names: str) -> Iterator[list[int]]:
    """Bytes of every tensor that this rank gives inside to calls of these names; by default of all but exchanges."""
    found: list[int] = []
    calls = {name: getattr(dist, name) for name in names or ("all_reduce", "all_gather")}

    def counting(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            found.append(args[name != "all_reduce"].nbytes)  # the others have the result first
            return calls[name](*args, **kwargs)

        return call

    for name in calls:
        setattr(dist, name, counting(name))
    try:
        yield found
    finally:
        for name, call in calls.items():
            setattr(dist, name, call)


def check_a_rank_gets_its_own_rows_of_hiddens_gradient_where_that_is_all_it_needs() -> None:
    world, rank = dist.get_world_size(), dist.get_rank()
    hidden, weight, bias, targets = problem(48, 16, 103)
    each, full = 48 // world, targets.clamp(min=0)
    none_there = targets.clone()
    none_there[each : 2 * each] = -100  # nothing of the second rank's
    for dtype in (torch.float32, torch.bfloat16):
        for given in (targets, full, none_there, torch.full_like(targets, -100)):
            for reduction, upstream in (("sum", 1.0), ("none", torch.linspace(-1, 2, 48))):
                arguments = (hidden.to(dtype), weight.to(dtype), bias.to(dtype), given, cut(103), upstream)
                want = run_linear(*arguments, reduction=reduction)
                with counted_bytes("all_to_all_single") as exchanged, counted_bytes() as sent:
                    got = run_linear(*arguments, reduction=reduction, hidden_grad="own")
                own = torch.zeros(48, dtype=torch.bool)
                own[rank * each : (rank + 1) * each] = True
                loose = {} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.05}
                torch.testing.assert_close(got[1][own], want[1][own], **loose)
                assert not got[1][~own].any() and all(map(torch.equal, got[:1] + got[2:], want[:1] + want[2:]))
                num_rows = int((given != -100).sum())
                size = num_rows * 16 * dtype.itemsize
                assert exchanged == [size] * (num_rows > 0) and (not size or size not in sent)
                assert torch.equal(got[1], run_linear(*arguments, reduction=reduction, hidden_grad="own")[1])
    raises(ValueError, f"hidden has 47 rows, which {world} ranks cannot own evenly; pad",
           lambda: run_linear(hidden[1:], weight, bias, targets[1:], cut(103), 1.0, hidden_grad="own"))
    raises(ValueError, "hidden_grad is 'mine'; it must be 'all' or 'own'",
           lambda: run_linear(hidden, weight, bias, targets, cut(103), 1.0, hidden_grad="mine"))
    raises(ValueError, "which rows of hidden's gradient: rank 1 of the group has 'own' and rank 0 'all'",
           lambda: run_linear(hidden, weight, bias, targets, cut(103), 1.0, z_loss=0.5, hidden_grad=(
               "own" if rank == 1 else "all")))


def check_bytes_on_the_wire_are_those_of_the_docstring() -> None:
    hidden, weight, _, targets = problem(50, 16, 301)
    M = int((targets != -100).sum())
    chunks = -(-M // vocab_shards.rows_per_chunk(M, max(cut(301)), 4, "cpu"))
    assert chunks > 1
    for smoothing, numbers in ((0.0, 2), (0.1, 3)):
        run_linear(hidden, weight, None, targets, cut(301), 1.0, label_smoothing=smoothing)  # the ranks agree
        with counted_bytes() as sent:
            run_linear(hidden, weight, None, targets, cut(301), 1.0, label_smoothing=smoothing)
        assert len(sent) == chunks + 1 and sent[-1] == M * 16 * 4
        assert sum(sent[:-1]) == 8 * (numbers * M + 2)
        run_logits(hidden @ weight.t(), targets, cut(301), 1.0, label_smoothing=smoothing)
        with counted_bytes() as sent:
            run_logits(hidden @ weight.t(), targets, cut(301), 1.0, label_smoothing=smoothing)
        assert sent == [8 * (numbers * M + 2)]
    far = (hidden @ weight.t()).double() * 1e4
    with counted_bytes() as sent:
        run_logits(far, targets, cut(301), 1.0, label_smoothing=0.1)
    assert sent[1:] == [8 * (3 * M + 2), 8 * M, 8 * M]  # after the agreement: the sums, the maxima, the sums again


def check_logits_exist_one_chunk_at_a_time() -> None:
    N, D, V = 300, 4, 1000
    hidden, weight, bias, targets = problem(N, D, V)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, Tensor):
                    largest = max(largest, tensor.numel())
            return result

    for reduction, upstream in (("mean", 1.0), ("none", torch.ones(N))):
        with Watch():
            run_linear(hidden, weight, bias, targets, cut(V), upstream, reduction=reduction)
    assert largest <= max(16 * max(cut(V)), V * D, N * D), largest


def raises(kind: type[Exception], pattern: str, call: Any) -> None:
    with pytest.raises(kind, match=pattern):
        call()
    dist.barrier()  # every rank got here: none of them waits for another in a collective of the call


def check_shards_that_overlap_or_leave_a_hole_are_named() -> None:
    rank, targets = dist.get_rank(), torch.zeros(4, dtype=torch.int64)

    def call(start: int | None, size: int = 5) -> None:
        vocab_parallel.cross_entropy(torch.zeros(4, size), targets, vocab_start=start)

    raises(ValueError, r"rank 1 holds classes \[3, 8\) and rank 0 those before 5.*overlap", lambda: call(3 * rank))
    raises(ValueError, r"rank 1 holds classes \[6, 11\), and no rank holds \[5, 6\).*hole", lambda: call(6 * rank))
    raises(ValueError, r"vocab_start was given on some ranks only \(rank 1", lambda: call(None if rank == 1 else 0))
    raises(ValueError, "no rank holds a class", lambda: call(None, 0))
    raises(ValueError, "vocab_start is -5; it must not be negative", lambda: call(-5))
    raises(ValueError, "vocab_size is 7, and the shards",
           lambda: vocab_parallel.cross_entropy(torch.zeros(4, 5), targets, vocab_size=7))  # fmt: skip
    last_first = (dist.get_world_size() - 1 - rank) * 5
    call(last_first)  # any order will do
    raises(ValueError, r"held 5 classes .* and now 6 .*pass vocab_size", lambda: call(last_first, 6))


def check_ranks_that_disagree_all_get_the_error() -> None:
    rank, other = dist.get_rank(), dist.get_rank() == 1
    hidden, weight, _, targets = problem(8, 4, 10)
    sizes = cut(10)

    def call(**changes: Any) -> None:
        given = {"hidden": hidden, "weight": mine(weight, sizes), "targets": targets, "vocab_size": 10, **changes}
        vocab_parallel.linear_cross_entropy(**given)

    raises(ValueError, "number of rows: rank 1 of the group has 7 and rank 0 8.*data-parallel group",
           lambda: call(hidden=hidden[other:], targets=targets[other:]))  # fmt: skip
    raises(ValueError, "input type: rank 1 of the group has torch.bfloat16 and rank 0 torch.float32",
           lambda: call(hidden=hidden.bfloat16() if other else hidden))  # fmt: skip
    raises(ValueError, "label_smoothing: rank 1 of the group has 0.1 and rank 0 0;",
           lambda: call(label_smoothing=0.1 if other else 0.0))  # fmt: skip
    raises(ValueError, "reduction: rank 1 of the group has 'sum' and rank 0 'mean'",
           lambda: call(reduction="sum" if other else "mean"))  # fmt: skip
    raises(ValueError, "gradient is wanted: rank 1 of the group has 1 and rank 0 0",
           lambda: call(hidden=hidden.clone().requires_grad_(other)))  # fmt: skip
    raises(ValueError, "fingerprint of the targets: rank 1",
           lambda: call(targets=targets.flip(0) if other else targets))  # fmt: skip
    call()
    raises(ValueError, "ranks of the group were given different targets",
           lambda: call(targets=targets.masked_fill(targets == 0, 2) if rank == 1 else targets))  # fmt: skip


def check_a_rank_with_bad_arguments_does_not_leave_the_others_waiting() -> None:
    group = dist.new_group(list(range(dist.get_world_size())))
    logits, targets = torch.zeros(4, 5), torch.zeros(4, dtype=torch.int64)
    bad = dist.get_rank() == 1
    shape = r"targets have shape \(3,\); they must be \(N,\) = \(4,\)"
    raises(ValueError, shape if bad else "rank 1 of the group refused its arguments",
           lambda: vocab_parallel.cross_entropy(logits, targets[bad:], group=group))  # fmt: skip


def check_bad_arguments_are_named() -> None:
    logits, targets, weight = torch.zeros(4, 5), torch.zeros(4, dtype=torch.int64), torch.zeros(5, 3)
    total = 5 * dist.get_world_size()
    vocab_parallel.cross_entropy(logits, targets, vocab_size=total)
    calls = {
        "logits has shape": lambda: vocab_parallel.cross_entropy(logits[None], targets),
        "logits is torch.int64": lambda: vocab_parallel.cross_entropy(logits.long(), targets),
        "targets are torch.float32": lambda: vocab_parallel.cross_entropy(logits, targets.float()),
        "softcap is 0.0; it must be positive": lambda: vocab_parallel.cross_entropy(logits, targets, softcap=0.0),
        "reduction is 'avg'": lambda: vocab_parallel.cross_entropy(logits, targets, reduction="avg"),  # type: ignore
        "impl='triton' cannot serve": lambda: vocab_parallel.cross_entropy(logits, targets, impl="triton"),
        r"weight has shape \(5, 3\); it must be \(S, D\) with D = 5": lambda: vocab_parallel.linear_cross_entropy(
            logits, weight, targets
        ),
        r"bias has shape \(4,\)": lambda: vocab_parallel.linear_cross_entropy(
            torch.zeros(4, 3), weight, targets, bias=torch.zeros(4)
        ),
    }
    for pattern, call in calls.items():
        raises(ValueError, pattern, call)
    for bad in (total, -1):
        raises(IndexError, rf"targets\[2\] is {bad}; a target must be in \[0, {total}\)",
               lambda: vocab_parallel.cross_entropy(logits, torch.tensor([0, 1, bad, 3]), vocab_size=total))  # noqa: B023


def check_a_dtensor_brings_its_own_group() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    hidden, weight, bias, targets = problem(21, 8, 50)
    leaf = hidden.clone().requires_grad_()
    w, b = (distribute_tensor(tensor, mesh, [Shard(0)]).requires_grad_() for tensor in (weight, bias))
    loss = vocab_parallel.linear_cross_entropy(leaf, w, targets, bias=b)
    loss.backward()
    want = reference((hidden, weight, bias), targets, 1.0, {}, "mean")
    assert isinstance(w.grad, DTensor) and w.grad.placements == (Shard(0),)
    for got, truth in zip((loss, leaf.grad, w.grad.full_tensor(), b.grad.full_tensor()), want):
        torch.testing.assert_close(got, truth)
    logits = distribute_tensor(hidden @ weight.t(), mesh, [Shard(1)]).requires_grad_()
    loss = vocab_parallel.cross_entropy(logits, distribute_tensor(targets, mesh, [Replicate()]))
    loss.backward()
    want = reference((hidden @ weight.t(),), targets, 1.0, {}, "mean")
    torch.testing.assert_close(loss, want[0])
    torch.testing.assert_close(logits.grad.full_tensor(), want[1])
    wrong = distribute_tensor(weight, mesh, [Replicate()])
    raises(ValueError, r"weight is placed as .*; it must be Shard\(0\)",
           lambda: vocab_parallel.linear_cross_entropy(hidden, wrong, targets))  # fmt: skip
    raises(ValueError, "group is not the one that weight is divided over",
           lambda: vocab_parallel.linear_cross_entropy(hidden, w, targets, group=dist.new_group()))  # fmt: skip


def check_a_compiled_model_breaks_its_graph_here_and_goes_on() -> None:
    hidden, weight, _, targets = problem(12, 8, 30)

    def loss_of(h: Tensor, w: Tensor) -> Tensor:
        return vocab_parallel.linear_cross_entropy(torch.relu(h), w, targets, vocab_size=30) * 2

    h, w = hidden.clone().requires_grad_(), mine(weight, cut(30)).requires_grad_()
    want = torch.autograd.grad(loss_of(h, w), (h, w))
    for got, eager in zip(torch.autograd.grad(torch.compile(loss_of, backend="eager")(h, w), (h, w)), want):
        assert torch.equal(got, eager)


CHECKS = [name.removeprefix("check_") for name in list(globals()) if name.startswith("check_")]


def run_rank(rank: int, world: int, directory: Path) -> None:
    torch.set_num_threads(1)
    chunks = vocab_shards.rows_per_chunk.__globals__  # of this process only: the tests that import this keep theirs
    chunks["MIN_ROWS"], chunks["WORKSPACE_BYTES"] = 7, {"cpu": 1, "cuda": 1}  # every problem takes several chunks
    dist.init_process_group("gloo", init_method=f"file://{directory / f'store-{world}'}", rank=rank, world_size=world,
                            timeout=datetime.timedelta(seconds=20))  # fmt: skip
    verdicts = {}
    for name in CHECKS:
        try:
            globals()[f"check_{name}"]()
            verdicts[name] = ""
        except BaseException:
            verdicts[name] = traceback.format_exc()
            break  # the others may be elsewhere by now
    (directory / f"{world}-{rank}.json").write_text(json.dumps(verdicts))
    dist.destroy_process_group()


if __name__ == "__main__":
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=run_rank, args=(rank, world, Path(sys.argv[1])))
             for world in WORLDS for rank in range(world)]  # fmt: skip
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
