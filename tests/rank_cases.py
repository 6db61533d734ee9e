"""Runs that must come out alike on any number of ranks, and the launcher that starts the ranks of one session.

    torchrun --nproc-per-node 2 tests/rank_cases.py OUT CASE...

runs the cases one after the other and writes each one's tensors to OUT/CASE.safetensors (rank 0). A test calls the same
function in its own process and compares.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from tiny_runs import LENGTH, VOCAB, copy_of, plain_loader, tiny_trainer, token_loader, tokens
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fasttrain import gradient_buckets
from fasttrain.averaging import EMA
from fasttrain.callbacks import Callback, SampleText
from fasttrain.data import TokenDataset, TokenLoader
from fasttrain.models.gpt import GPT, GPTConfig
from fasttrain.profiling import Norms
from fasttrain.screens import screen_for
from fasttrain.shards import gathered
from fasttrain.state import TrainState
from fasttrain.utils import is_out_of_memory
from fasttrain.verification import first_difference

ROOT = Path(__file__).parent.parent
WORLD = int(os.environ.get("WORLD_SIZE", "1"))
RANK = int(os.environ.get("RANK", "0"))
SMALLEST_BUCKET = 256  # bytes: models this small would have one bucket otherwise


def gpt(hidden: int = 16, **options: Any) -> GPT:
    torch.manual_seed(RANK)  # the others get rank 0's
    return GPT(GPTConfig(**{"vocab_size": VOCAB, "num_layers": 2, "num_heads": 2, "hidden_size": hidden,
                            "intermediate_size": hidden, "max_seq_len": LENGTH, "dropout": 0.0, **options}))


def ragged(count: int = 5) -> list[tuple[Tensor, Tensor]]:
    """Batches of different lengths with gaps in the labels."""
    batches = []
    for index in range(count):
        x = tokens(2 * (LENGTH - index % 3), seed=index).view(2, -1)
        batches.append((x, x.roll(-1, 1).masked_fill(x % (2 + index) == 0, -100)))
    return batches


def train(parallel: str, loader: Any, model: nn.Module | None = None, *, micro_batches: int = 4,
          callbacks: Sequence[Any] = (), **config: Any) -> dict[str, Tensor]:
    """Four micro-batches a step, whoever computes them; weights, moments, averages and figures afterwards."""
    torch.manual_seed(123)
    settings: dict[str, Any] = {
        "max_steps": 5, "max_grad_norm": 0.5, "val_dataloader": token_loader(5, seed=9), "eval_every_steps": 2,
        "grad_accum_steps": micro_batches // WORLD, **config}
    evaluated = Evaluated()
    trainer = tiny_trainer(None, loader, model or gpt(), callbacks=[*callbacks, evaluated], parallel=parallel,
                           **settings)
    trainer.progress.stream = io.StringIO()
    result = trainer.train()
    assert trainer.state is not None
    trees = gathered(trainer.state.capture(), keep=True)
    found = {f"model/{name}": tensor for name, tensor in trees["model"].items()}
    for index, entry in trees["optimizer"]["state"].items():
        found.update({f"optimizer/{index}/{key}": value for key, value in entry.items() if isinstance(value, Tensor)})
    for callback in callbacks:
        if isinstance(callback, EMA):
            found.update({f"ema/{name}": gathered(value, True) for name, value in callback.averages.items()})
    figures = [result.train_loss, result.val_loss or 0.0, result.tokens_seen, result.step, result.nonfinite_steps]
    found["evaluated"] = torch.tensor(evaluated.steps)
    found["figures"] = torch.tensor(figures, dtype=torch.float64)
    return {name: tensor.detach().clone().contiguous() for name, tensor in found.items()}


class Evaluated(Callback):
    """After which steps there was an evaluation."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_eval(self, state: TrainState, result: Any) -> None:
        self.steps.append(state.step)


class Heard(Callback):
    """The norms of the first step, as they were reported."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_event(self, state: TrainState, kind: str, details: Any) -> None:
        if kind == "norms":
            self.norms = [details[key] for key in sorted(details)]


def norms(parallel: str) -> dict[str, Tensor]:
    heard = Heard()
    found = train(parallel, token_loader(7), max_steps=1, log_every_steps=1, callbacks=[Norms(), heard])
    return {**found, "norms": torch.tensor(heard.norms)}


class StopOnLastRank(Callback):
    """Asks for the end, and for nothing else, on the last rank alone."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, state: TrainState) -> None:
        if state.step == self.step and RANK == WORLD - 1:
            state.request_stop("the last rank wants to")


class SignalOnLastRank(Callback):
    """SIGTERM, to one process of the team."""

    def on_step(self, state: TrainState) -> None:
        if state.step == 3 and RANK == WORLD - 1:
            os.kill(os.getpid(), signal.SIGTERM)


def broken_on_one_place(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Next-token loss, infinite for the batch that begins with token 3."""
    from fasttrain.losses import batch_loss

    loss_sum, num_targets = batch_loss(model, batch)
    return loss_sum * torch.where(batch[0].flatten()[0] == 3, torch.inf, 1.0), num_targets


def marked() -> list[tuple[Tensor, Tensor]]:
    batches = [(x.clone(), y) for x, y in ragged(8)]
    for index, (x, _) in enumerate(batches):
        x[0, 0] = 3 if index == 5 else 1  # place 5: rank 1 of 2, in step 2
    return batches


def foreign(parallel: str) -> dict[str, Tensor]:
    model = gpt()
    return train(parallel, token_loader(7), model, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2))


class Odd(nn.Module):
    """Parameters that no batch, not every batch, or no step before the third reaches, in the middle of all others.

    Args:
        fails: calls whose backward runs out of memory once all gradients but the table's are complete.
        routed: which factor a batch is given depends on its first token (so it must not be divided).
        twice: a layer's gradient comes in two parts.
    """

    def __init__(self, fails: Sequence[int] = (), routed: bool = True, twice: bool = False) -> None:
        super().__init__()
        torch.manual_seed(RANK)
        self.fails, self.routed, self.twice, self.calls, self.failures = fails, routed, twice, 0, 0
        self.table = nn.Embedding(VOCAB, 32)
        self.never, self.late = nn.Linear(32, 32), nn.Linear(32, 32)
        self.even, self.odd = nn.Parameter(torch.ones(32)), nn.Parameter(torch.ones(32))  # they share a bucket
        self.shared, self.head = nn.Linear(32, 32), nn.Linear(32, VOCAB)
        self.late.requires_grad_(False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = torch.tanh(self.table(input_ids))
        if x.requires_grad:
            self.calls += 1
            if self.calls in self.fails:
                x.register_hook(self._fail)
        x = self.late(x * (self.odd if self.routed and int(input_ids[0, 0]) > 12 else self.even))
        for _ in range(2 if self.twice else 1):
            x = checkpoint(self.shared, torch.tanh(x), use_reentrant=True) if self.twice else self.shared(torch.tanh(x))
        return self.head(x)

    def _fail(self, grad: Tensor) -> None:
        self.failures += 1
        raise torch.OutOfMemoryError("CUDA out of memory.")


class Unfreeze(Callback):
    """From the third step on, on every rank."""

    def on_step(self, state: TrainState) -> None:
        if state.step == 2:
            state.model.late.requires_grad_(True)


def odd(parallel: str, model: Odd | None = None) -> dict[str, Tensor]:
    model = model or Odd()
    gradient_buckets.SMALLEST_BUCKET = 5000  # some buckets with two of those
    found = train(parallel, token_loader(7), model, callbacks=[Unfreeze()],
                  optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2))
    gradient_buckets.SMALLEST_BUCKET = SMALLEST_BUCKET
    return found


def sent_in_backward(parallel: str) -> dict[str, Tensor]:
    """How many buckets each step sent before its backward was over, and how many in all."""
    counts: list[list[int]] = []

    class Count(gradient_buckets.GradientBuckets):
        def used(self) -> list[float]:
            counts.append([self._sent])
            return super().used()

        def receive(self, sums: Sequence[float]) -> None:
            counts[-1].append(self._sent)
            super().receive(sums)

    import fasttrain.replicas
    fasttrain.replicas.GradientBuckets = Count  # type: ignore[misc]
    try:
        train(parallel, token_loader(7), val_dataloader=None)
    finally:
        fasttrain.replicas.GradientBuckets = gradient_buckets.GradientBuckets  # type: ignore[misc]
    return {"counts": torch.tensor(counts)}


def short_of_memory(parallel: str) -> dict[str, Tensor]:
    """The last rank's memory runs out in the last backward of step 2, with most of its gradients sent already."""
    fails = [4] if WORLD > 1 and RANK == WORLD - 1 else []
    model = Odd(fails, routed=False)
    found = odd(parallel, model)
    assert model.failures == len(fails)
    return found


def tight(place: str, parallel: str) -> dict[str, Tensor]:
    """The last rank has no memory for two rows at a time in its second block: in the forward, in the backward, or only
    in the second micro-batch of a step, where parameters are gathered already. All ranks do the window in halves."""
    model, failures = gpt(num_layers=3), 0

    def fail(*_: Any) -> None:
        nonlocal failures
        failures += 1
        raise torch.OutOfMemoryError("CUDA out of memory.")

    def look(module: nn.Module, arguments: Any, output: Any) -> None:
        tight = WORLD > 1 and RANK == WORLD - 1 and output.size(0) > 1 and output.requires_grad
        if tight and not (place == "second" and seen.states[0].window.micro_step == 0):
            output.register_hook(fail) if place == "backward" else fail()

    events, seen = Events(), Seen()
    model.blocks[1].register_forward_hook(look)
    found = train(parallel, token_loader(7), model, callbacks=[seen, events])
    assert failures == int(WORLD > 1 and RANK == WORLD - 1), failures
    assert events.seen == ["out_of_memory"] * (WORLD > 1), events.seen
    return found


def hopeless(parallel: str) -> dict[str, Tensor]:
    """The last rank never computes a pass, and has memory to follow the others: all end with one error, none waits."""
    model, seen = gpt(), Seen()

    def fail(module: nn.Module, arguments: Any, output: Any) -> None:
        if RANK == WORLD - 1 and not seen.states[0].window.out_of_memory:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    model.blocks[1].register_forward_hook(fail)
    try:
        train(parallel, token_loader(7), model, micro_batches=WORLD, val_dataloader=None, callbacks=[seen])
    except torch.OutOfMemoryError as error:
        return {"said so": torch.tensor("one sequence of 2 at a time is still too much" in str(error))}
    raise AssertionError("it should have ended")


class Seen(Callback):
    """The state, for what has to look at it."""

    def __init__(self) -> None:
        self.states: list[TrainState] = []

    def on_train_start(self, state: TrainState, run: Any) -> None:
        self.states.append(state)


class Events(Callback):
    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_event(self, state: TrainState, kind: str, details: Any) -> None:
        self.seen.append(kind)


def sampled(parallel: str) -> dict[str, Tensor]:
    """Generation in the middle of training takes all ranks and changes nothing."""
    class Letters:
        def encode(self, text: str) -> list[int]:
            return [ord(letter) % VOCAB for letter in text]

        def decode(self, ids: Sequence[int]) -> str:
            return "".join(chr(97 + token) for token in ids)

    torch.manual_seed(123)
    shown: list[str] = []
    trainer = tiny_trainer(None, token_loader(7), gpt(), parallel=parallel, max_steps=4, grad_accum_steps=4 // WORLD,
                           val_dataloader=token_loader(3), eval_every_steps=2,
                           callbacks=[SampleText("ab", max_new_tokens=4, temperature=0.0)])
    trainer.tokenizer = Letters()
    trainer.progress.stream = io.StringIO()
    trainer.progress.log = shown.append  # type: ignore[method-assign]
    trainer.train()
    text = trainer.generate_text("ab", max_new_tokens=4, temperature=0.0)
    line = next(line for line in shown if line.startswith("sample at step 4")) if RANK == 0 else ""
    assert RANK or line.endswith("ab" + text) or line.endswith(text), (line, text)
    return {"text": torch.tensor([ord(letter) for letter in text])}


def on_meta(parallel: str, **options: Any) -> dict[str, Tensor]:
    """Built without memory; the weights are those of its own initialisation, whoever makes which part."""
    with torch.device("meta"):
        model = gpt(**options)
    return train(parallel, token_loader(7), model, seed=5, max_steps=2)


@contextlib.contextmanager
def room_for(num_bytes: int) -> Iterator[None]:
    """So many bytes that can be written to, beside those that this process has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    resource.setrlimit(resource.RLIMIT_DATA, (int(fields["VmData"].split()[0]) * 1024 + num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def fits(build: Callable[[], Any]) -> bool:
    """Whether it has the memory; tried in a copy of this process, so that nothing is left behind here."""
    child = os.fork()
    if not child:
        code = 2
        try:
            build()
            code = 0
        except RuntimeError as error:
            code = 1 if is_out_of_memory(error) else 2
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 1), code
    return code == 0


def larger_than_memory(parallel: str, hidden: int = 256, sgd: bool = False, **config: Any) -> dict[str, Tensor]:
    """On several ranks in room for 19/20 of the weights: the model built whole is too much for such a process, and
    training it, spread, is not. In one process without a limit. Blocks are many and alike: two are gathered at a time,
    beside the buffers of one."""
    sizes = GPTConfig(vocab_size=VOCAB, num_layers=26, num_heads=4, hidden_size=hidden, intermediate_size=2 * hidden,
                      max_seq_len=4, tie_embeddings=False)
    with torch.device("meta"):
        model = GPT(sizes)
    threading.stack_size(1 << 20)  # of the threads that load batches: 8 MiB each otherwise, used or not
    loader, few = (TokenLoader(TokenDataset(tokens(count * 4 + 1), 4), 1) for count in (8, 4))
    trainer = tiny_trainer(None, loader, model, max_steps=2, parallel=parallel, grad_accum_steps=4 // WORLD, lr=1e-3,
                           optimizer=torch.optim.SGD(model.parameters(), 1e-3) if sgd else None,
                           optimizer_state_dtype="int8", val_dataloader=few, **config)
    trainer.progress.stream = io.StringIO()
    room = sum(p.nbytes for p in model.parameters()) * 19 // 20
    with contextlib.nullcontext() if WORLD == 1 else room_for(room):
        assert WORLD == 1 or not fits(lambda: GPT(sizes))
        result = trainer.train()
    return {"losses": torch.tensor([result.train_loss, result.val_loss or 0.0], dtype=torch.float64)}


def rounded(parallel: str) -> dict[str, Tensor]:
    """Eight-bit moments of parameters over 4096 elements, whose random bits go by the place in the whole."""
    return train(parallel, token_loader(7), gpt(64, num_heads=2), optimizer_state_dtype="int8", max_steps=4)


def bfloat16_moments(parallel: str) -> dict[str, Tensor]:
    return train(parallel, token_loader(7), gpt(), optimizer_state_dtype="bfloat16")


def recorded(ledger: list[int], model: nn.Module, batch: Any, signal_at: int = 0) -> tuple[Tensor, Tensor]:
    """Next-token loss that writes down which batch this was, and at the `signal_at`-th is sent SIGTERM."""
    from fasttrain.losses import batch_loss

    if signal_at and len(ledger) == signal_at - 1:
        os.kill(os.getpid(), signal.SIGTERM)
    ledger.append(int((batch[0].flatten().double() * torch.arange(1, batch[0].numel() + 1)).sum()))
    return batch_loss(model, batch)


def session(folder: Path, parallel: str, steps: int, *, dropout: float = 0.0, state_dtype: str = "float32",
            plain: bool = False, signal_at: int = 0) -> tuple[dict[str, Tensor], list[int]]:
    """One session of a run of 6 steps of 4 batches in `folder`, ended after `steps`: (the whole state afterwards, which
    batches this rank used)."""
    ledger: list[int] = []
    torch.manual_seed(123)
    trainer = tiny_trainer(folder, plain_loader(7) if plain else token_loader(7), gpt(64, dropout=dropout),
                           max_steps=steps, schedule="constant", warmup_steps=2, grad_accum_steps=4 // WORLD,
                           parallel=parallel, save_every_steps=2, optimizer_state_dtype=state_dtype,
                           loss_fn=functools.partial(recorded, ledger, signal_at=signal_at), callbacks=[EMA(0.9)])
    trainer.progress.stream = io.StringIO()
    trainer.train()
    assert trainer.state is not None
    trees = gathered(trainer.state.capture(), keep=True)
    found = {f"model/{name}": tensor for name, tensor in trees["model"].items()}
    for index, entry in trees["optimizer"]["state"].items():
        found.update({f"optimizer/{index}/{key}": value for key, value in entry.items()})
    averages = trees["training"]["callbacks"][0][1]["averages"]
    found.update({f"ema/{name}": value for name, value in averages.items()})
    return {name: tensor.detach().clone().contiguous() for name, tensor in found.items()}, ledger


def continued(parallel: str) -> dict[str, Tensor]:
    """With dropout: 6 steps at once, and 3 steps and 3 more in a new trainer; the same bits on as many ranks."""
    straight, whole = session(FOLDER / f"straight-{parallel}", parallel, 6, dropout=0.2)
    _, first = session(FOLDER / f"parts-{parallel}", parallel, 3, dropout=0.2)
    resumed, rest = session(FOLDER / f"parts-{parallel}", parallel, 6, dropout=0.2)
    different = [name for name, tensor in straight.items() if not tensor.equal(resumed[name])]
    assert not different, different
    assert whole == first + rest
    return {"equal": torch.ones(1)}


def link(parallel: str) -> dict[str, Tensor]:
    """One link of a chain of sessions: FOLDER/run, up to the step in FOLDER/steps."""
    state, ledger = session(FOLDER / "run", parallel, int((FOLDER / "steps").read_text()), plain=True,
                            state_dtype=(FOLDER / "dtype").read_text())
    (FOLDER / f"ledger-{RANK}").write_text(" ".join(map(str, ledger)))
    return state


def doomed(parallel: str) -> dict[str, Tensor]:
    """A run of 6 steps with a checkpoint every second, one of whose ranks gets a signal at a place in step 4: the
    environment's DOOM is 'rank place signal'. In the backward it is an error, in the last gradient of all. Each rank
    appends the batches it used to a ledger of its own."""
    import fasttrain.checkpointing
    import fasttrain.distributed
    import fasttrain.shard_files

    rank, place, number = os.environ.get("DOOM", "-1 nowhere 0").split()
    calls = {"forward": 0, "reduce": 0, "save": 0}

    def struck(name: str, function: Callable[..., Any], at: int) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            if int(rank) == RANK and name == place and calls[name] == at:
                os.kill(os.getpid(), int(number))
            return function(*args, **kwargs)

        return call

    team = fasttrain.distributed.Team
    team.sum_tensors = struck("reduce", team.sum_tensors, 4)  # type: ignore[method-assign]
    for module in (fasttrain.shard_files, fasttrain.checkpointing):
        module.write_trees = struck("save", module.write_trees, 2)  # type: ignore[attr-defined]
    ledger: list[int] = []
    forward = struck("forward", functools.partial(recorded, ledger), 7)

    def loss(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        if int(rank) == RANK and place == "backward" and calls["forward"] == 7:

            def fail(grad: Tensor) -> None:
                raise ValueError("the backward failed")

            next(model.parameters()).register_hook(fail)
        return forward(model, batch)

    trainer = tiny_trainer(FOLDER / "run", token_loader(7), gpt(), grad_accum_steps=4 // WORLD, parallel=parallel,
                           save_every_steps=2, loss_fn=loss)
    result = trainer.train()
    return {"step": torch.tensor([result.step, result.tokens_seen])}


class Forgetful(GPT):
    """Has state on the last rank that no checkpoint can see."""

    calls = 0

    def forward(self, *args: Any, **options: Any) -> Any:
        self.calls += RANK == WORLD - 1
        return super().forward(*args, **options) * (1 + 0.1 * self.calls)


def mean_instead_of_sum(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    from fasttrain.losses import batch_loss

    loss_sum, count = batch_loss(model, batch)
    return loss_sum / count, count


def verified(parallel: str) -> dict[str, Tensor]:
    """Both proofs before a run and inside it, which they leave as it was; then with faults, which all ranks see."""
    torch.manual_seed(123)
    settings: dict[str, Any] = {"parallel": parallel, "grad_accum_steps": 2, "optimizer_state_dtype": "int8"}
    trainer = tiny_trainer(FOLDER / f"verified-{parallel}", plain_loader(7), gpt(64, dropout=0.2), callbacks=[EMA(0.9)],
                           max_steps=3, **settings)
    trainer.progress.stream = io.StringIO()
    for _ in range(2):
        state = trainer._built_state()
        before = copy_of(gathered(state.capture(), keep=True))
        resumed = trainer.verify_resume(steps=3)
        assert resumed.ok and f"3 steps on {WORLD} ranks" in resumed.summary, resumed
        assert "the same 12 batches" in resumed.summary, resumed
        math = trainer.verify_batch_math()
        assert math.ok and f"2 micro-batches on {WORLD} ranks" in math.summary, math
        different = first_difference(before, copy_of(gathered(state.capture(), keep=True)))
        assert not different, different
        trainer.train()
    assert not list((FOLDER / f"verified-{parallel}").glob(".inflight-*"))
    config = GPTConfig(vocab_size=VOCAB, num_layers=1, num_heads=2, hidden_size=16, max_seq_len=LENGTH)
    lost = tiny_trainer(None, token_loader(7), Forgetful(config), **settings).verify_resume()
    assert not lost.ok and lost.summary.startswith("rank 0: model."), lost
    wrong = tiny_trainer(None, token_loader(7), gpt(), loss_fn=mean_instead_of_sum, **settings).verify_batch_math()
    assert not wrong.ok and wrong.first_difference == next(name for name, _ in gpt().named_parameters()), wrong
    divided = [((x + RANK) % VOCAB, y) for x, y in ragged(3)]  # each rank has another first batch
    own = tiny_trainer(None, divided, gpt(), **settings).verify_batch_math()
    targets = int((divided[0][1] != -100).sum())
    assert own.ok and f"one batch of {WORLD * targets} targets" in own.summary, own
    return {"told": torch.tensor([ord(letter) for letter in lost.summary])}


def paced(parallel: str) -> dict[str, Tensor]:
    """A run in FOLDER/paced whose last rank computes 30 ms longer in each micro-batch; what rank 0 showed is in
    FOLDER/paced.txt."""
    from fasttrain.losses import batch_loss

    def slow(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        time.sleep(0.03 if RANK == WORLD - 1 else 0.0)
        return batch_loss(model, batch)

    trainer = tiny_trainer(FOLDER / "paced", token_loader(7), gpt(), max_steps=4, log_every_steps=2, grad_accum_steps=2,
                           parallel=parallel, loss_fn=slow)
    trainer.progress.stream, trainer.progress.plain_every_seconds = io.StringIO(), 0.0
    trainer.progress.screen = screen_for(trainer.progress.stream)
    trainer.train()
    if RANK == 0:
        (FOLDER / "paced.txt").write_text(trainer.progress.stream.getvalue())
    return {"done": torch.ones(1)}


FOLDER = Path()

CASES: dict[str, Callable[[str], dict[str, Tensor]]] = {
    "tokens": lambda parallel: train(parallel, token_loader(7), callbacks=[EMA(0.9)]),
    "plain": lambda parallel: train(parallel, plain_loader(7)),
    "ragged": lambda parallel: train(parallel, ragged(), max_steps=0, max_epochs=3, val_dataloader=ragged(3),
                                     every_tokens={"eval": 60}),
    "global_batch": lambda parallel: train(parallel, token_loader(7), grad_accum_steps=1, global_batch_size=8),
    "recomputed": lambda parallel: train(parallel, token_loader(7), activation_checkpointing="full"),
    "amp": lambda parallel: train(parallel, token_loader(7), precision="bfloat16"),
    "compiled": lambda parallel: train(parallel, token_loader(7), compile=True, max_steps=2),
    "untied": lambda parallel: train(parallel, ragged(), gpt(tie_embeddings=False), val_dataloader=ragged(3),
                                     callbacks=[EMA(0.9)]),
    "untied_few": lambda parallel: train(parallel, ragged(1), gpt(tie_embeddings=False), max_steps=0, max_epochs=3,
                                         val_dataloader=ragged(1)),
    "untied_meta": lambda parallel: on_meta(parallel, tie_embeddings=False),
    "one_micro_batch": lambda parallel: train(parallel, token_loader(7), micro_batches=2),
    "few_batches": lambda parallel: train(parallel, ragged(1), max_steps=0, max_epochs=3, val_dataloader=ragged(1)),
    "stopped": lambda parallel: train(parallel, token_loader(7), callbacks=[StopOnLastRank(3)]),
    "signalled": lambda parallel: train(parallel, token_loader(7), callbacks=[SignalOnLastRank()]),
    "nonfinite": lambda parallel: train(parallel, marked(), loss_fn=broken_on_one_place, val_dataloader=None),
    "norms": norms,
    "foreign": foreign,
    "odd": odd,
    "twice": lambda parallel: odd(parallel, Odd(twice=True)),
    "short_of_memory": short_of_memory,
    "tight_forward": functools.partial(tight, "forward"),
    "tight_backward": functools.partial(tight, "backward"),
    "hopeless": hopeless,
    "tight_second": functools.partial(tight, "second"),
    "sent_in_backward": sent_in_backward,
    "sampled": sampled,
    "meta": on_meta,
    "larger": functools.partial(larger_than_memory, hidden=208, sgd=True),
    "larger_adamw": functools.partial(larger_than_memory, preflight=True),
    "int8": rounded,
    "bf16_moments": bfloat16_moments,
    "continued": continued,
    "link": link,
    "doomed": doomed,
    "paced": paced,
    "verified": verified,
}


def case(name: str) -> dict[str, Tensor]:
    """'ragged-fsdp' -> that run."""
    stem, _, parallel = name.partition("-")
    return CASES[stem](parallel)


class Nursery:
    """A process that has imported everything and forks the ranks: a session then costs no start-up."""

    def __init__(self) -> None:
        path = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--nursery"], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"})

    def ask(self, **message: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


_STORES: list[Any] = []


@functools.cache
def nursery() -> Nursery:
    return Nursery()


def tend() -> None:
    """The nursery's own loop: {"start": environment, "arguments": [...], "output": file} -> pid; {"poll": pid} -> its
    exit code, negative for a signal, or null while it runs."""
    # A second and more of imports that each rank of fsdp would make.
    import torch._dynamo
    import torch.distributed.fsdp
    import torch.distributed.tensor  # noqa: F401

    codes: dict[int, int] = {}
    for line in sys.stdin:
        message = json.loads(line)
        if "start" in message:
            answer = os.fork()
            if not answer:
                be_rank(message)
        else:
            pid = message["poll"]
            if pid not in codes:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    codes[pid] = os.waitstatus_to_exitcode(status)
            answer = codes.get(pid)
        print(json.dumps(answer), flush=True)


def be_rank(message: dict[str, Any]) -> None:
    output = os.open(message["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(message["start"])
    code = 1
    try:
        code = main(message["arguments"]) or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


class Rank:
    """A forked rank."""

    def __init__(self, output: Path, arguments: Sequence[str | Path], environment: dict[str, str]) -> None:
        self._output = output
        self.pid: int = nursery().ask(start=environment, arguments=[str(part) for part in arguments],
                                      output=str(output))

    def poll(self) -> int | None:
        code: int | None = nursery().ask(poll=self.pid)
        return code

    def wait(self, seconds: float) -> int | None:
        end = time.monotonic() + seconds
        while (code := self.poll()) is None and time.monotonic() < end:
            time.sleep(0.02)
        return code

    def text(self) -> str:
        return self._output.read_text()


def start(world_size: int, folder: Path, *names: str, **environment: str) -> list[Rank]:
    """The ranks of one session, with the environment that torchrun would give them; the store is here, as it is with
    torchrun's agent."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    _STORES.append(store)
    shared = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(min(world_size, 2)), "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True", **environment}
    return [Rank(folder / f"rank-{rank}.txt", [folder, *names], {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(world_size)]


def finish(ranks: Sequence[Rank], timeout: float = 120.0) -> None:
    """Waits for all; fails with what was printed if one did not end well."""
    codes = [rank.wait(timeout) for rank in ranks]
    for rank, code in zip(ranks, codes):
        if code is None:
            os.kill(rank.pid, signal.SIGKILL)
    failed = [f"rank {index} ({codes[index]}): {rank.text()}" for index, rank in enumerate(ranks) if codes[index]
              or codes[index] is None]
    assert not failed, "\n".join(failed)


@functools.cache
def alone(name: str) -> dict[str, Tensor]:
    """The same run in this process."""
    return case(name.partition("-")[0] + "-auto")


def main(arguments: Sequence[str]) -> int:
    global FOLDER, WORLD, RANK
    WORLD, RANK = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    FOLDER = Path(arguments[0])
    gradient_buckets.SMALLEST_BUCKET = SMALLEST_BUCKET
    for each in arguments[1:]:
        outcome = case(each)
        if RANK == 0:
            save_file(outcome, FOLDER / f"{each}.safetensors")
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.modules["rank_cases"] = sys.modules["__main__"]
    tend() if sys.argv[1] == "--nursery" else main(sys.argv[1:])
