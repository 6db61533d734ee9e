"""Exact evaluation: the sum of all target losses over the number of targets, the same for any batch size.

Nothing is kept but four sums on the device, so memory does not grow with the data. The model, the global random
generators and the loader's position are left as they were: an evaluation in the middle of a training run changes no
bit of it. Deliberately left out: generation metrics and task benchmarks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .batch_stream import peek_batches
from .batches import num_rows, split_rows, to_device
from .dealing import END, PASSED, batches_per_turn, deal, dealt_from_start
from .distributed import ALONE, Team
from .heads import OutputHead, linear_head
from .losses import IGNORE, LossFunction, call_model, flat_logits, hidden_states, split_batch
from .ops import cross_entropy
from .utils import Interrupted, device_of, is_out_of_memory, preserve_rng, seed_all

_LOGITS_BYTES = 32 << 20
"""Logits are made and scored in chunks of rows of about this size, where the model can give its hidden states."""


@dataclass(frozen=True)
class EvalResult:
    """What a model scores on a data set."""

    loss: float
    """Mean negative log-likelihood of a target, nats."""
    perplexity: float
    """exp(loss)."""
    bits_per_byte: float | None
    """loss / ln 2 / bytes per token; None where the data does not say how many bytes a token stands for."""
    accuracy: float | None
    """Share of targets that are the model's first choice; None if the model returns no logits."""
    num_targets: int
    """Targets counted."""
    sets: Mapping[str, EvalResult] = field(default_factory=dict)
    """Each named set's result, where there are several; the figures above are then the first set's."""


@dataclass
class Pieces:
    """How finely evaluation batches are divided since memory ran out; lives as long as its owner wants to remember."""

    count: int = 1


class EvaluationInterrupted(Interrupted):
    """A signal came during an evaluation; there is no result."""


def evaluate(model: nn.Module, dataloader: Iterable[Any], *, loss_fn: LossFunction | None = None, max_batches: int = 0,
             device: torch.device | str | None = None,
             autocast: Callable[[], contextlib.AbstractContextManager[Any]] | None = None,
             bytes_per_token: float | None = None, interrupted: Callable[[], bool] | None = None,
             waiting: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
             pieces: Pieces | None = None, team: Team = ALONE, within: Callable[..., Any] | None = None) -> EvalResult:
    """Scores `model` on every batch of `dataloader` (the first `max_batches` if positive).

    Args:
        loss_fn: (model, batch) -> (loss_sum, num_targets) as in training; None: next-token cross-entropy.
        device: where the batches go (default: where the model is).
        autocast: a function that returns the context for the forward pass.
        bytes_per_token: for bits_per_byte (default: `dataloader.dataset.bytes_per_token`, if there is one).
        interrupted: asked after each batch; true raises EvaluationInterrupted.
        waiting: a context around each wait for a batch, such as `Interruption.breakable`.
        pieces: remembers over calls that batches had to be divided because memory ran out.
        team: the ranks that score the data together: each batch is scored by one of them, and all get the result.
        within: calls a function where the model's parameters can be read (see `replicas.Spread`).

    `dataloader` may be a mapping of names to loaders: each is scored (with `max_batches` of its own), the result's
    `sets` holds them all, and its own figures are those of the first.

    A loader with `from_start()` is read from there, one with `set_epoch` from epoch 0, and one that shuffles draws
    from a fixed seed, so two evaluations see the same batches.

    Raises:
        ValueError: no batch, or no target in any.
    """
    if isinstance(dataloader, Mapping):
        if not dataloader:
            raise ValueError("the evaluation data is an empty mapping; it must hold at least one named loader")
        options: dict[str, Any] = {
            "loss_fn": loss_fn, "max_batches": max_batches, "device": device, "autocast": autocast,
            "bytes_per_token": bytes_per_token, "interrupted": interrupted, "waiting": waiting, "pieces": pieces,
            "team": team, "within": within}
        results = {name: evaluate(model, loader, **options) for name, loader in dataloader.items()}
        return dataclasses.replace(next(iter(results.values())), sets=results)
    place = torch.device(device) if device is not None else device_of(model)
    pieces = pieces if pieces is not None else Pieces()
    context = autocast if autocast is not None else contextlib.nullcontext
    sums = _Sums(place)
    scorer = _score if within is None else functools.partial(within, _score)
    turn = batches_per_turn(dataloader, team.world_size)
    with preserve_rng(), _eval_mode(model), _position_kept(dataloader), torch.no_grad():
        seed_all(0)
        batches, mine = 0, None
        with _from_start(dataloader, team.rank if turn > 1 else 0, turn) as source:
            iterator = iter(source)
            while True:
                with waiting():
                    batch = next(iterator, END)
                if batch is END:
                    break
                if batch is not PASSED:
                    mine = batch
                    with context():
                        _add_divided(sums, scorer, model, to_device(batch, place), loss_fn, pieces)
                batches += 1
                if batches == max_batches:
                    break
                if interrupted is not None and batches % turn == 0 and interrupted():
                    raise EvaluationInterrupted
        if not batches:
            raise ValueError(f"the evaluation data ({type(dataloader).__name__}) yields no batch; check its length "
                             "against batch_size and drop_last")
        if within is not None and 0 < batches % turn <= team.rank:  # the others wait for our part of the model
            with context():
                scorer(model, to_device(peek_batches(dataloader, 1)[0] if mine is None else mine, place), loss_fn,
                       sums.loss.dtype)
        sums.add_up(team)
    if bytes_per_token is None:
        bytes_per_token = getattr(getattr(dataloader, "dataset", None), "bytes_per_token", None)
    return sums.result(bytes_per_token)


class _Sums:
    """Running sums, on the device and in float64 so that the order of batches does not show in the result."""

    def __init__(self, device: torch.device) -> None:
        wide = torch.float32 if device.type == "mps" else torch.float64  # mps has no float64
        self.loss = torch.zeros((), dtype=wide, device=device)
        self.targets = torch.zeros((), dtype=torch.int64, device=device)
        self.correct = torch.zeros((), dtype=torch.int64, device=device)
        self.has_accuracy = True

    def add(self, loss: Tensor, targets: Tensor, correct: Tensor | None) -> None:
        self.loss += loss
        self.targets += targets
        if correct is None:
            self.has_accuracy = False
        else:
            self.correct += correct

    def add_up(self, team: Team) -> None:
        """The sums of all ranks."""
        if not team.is_alone:
            totals = torch.stack([self.loss, self.targets.to(self.loss.dtype), self.correct.to(self.loss.dtype)])
            team.sum_tensors([totals], "summing an evaluation")
            self.loss, self.targets, self.correct = totals[0], totals[1].long(), totals[2].long()
            self.has_accuracy = not team.agree([float(not self.has_accuracy)])[0]

    def result(self, bytes_per_token: float | None) -> EvalResult:
        num_targets = int(self.targets)  # the one device read of an evaluation
        if num_targets == 0:
            raise ValueError(f"the evaluation data holds no target (every label is {IGNORE})")
        loss = float(self.loss) / num_targets
        return EvalResult(
            loss=loss,
            perplexity=math.exp(loss) if loss < 700 else math.inf if loss == loss else math.nan,
            bits_per_byte=loss / math.log(2) / bytes_per_token if bytes_per_token else None,
            accuracy=int(self.correct) / num_targets if self.has_accuracy else None,
            num_targets=num_targets,
        )


Score = tuple[Tensor, Tensor, "Tensor | None"]
"""Loss sum, number of targets, number of right first choices (None: unknown) of one batch."""


def _add_divided(sums: _Sums, scorer: Callable[..., Score], model: nn.Module, batch: Any, loss_fn: LossFunction | None,
                 pieces: Pieces) -> None:
    """Adds a batch's score, divided into pieces where the whole does not fit; nothing is added before all is known."""
    while True:
        try:
            scores = [scorer(model, piece, loss_fn, sums.loss.dtype) for piece in split_rows(batch, pieces.count)]
            break
        except Exception as error:
            if not is_out_of_memory(error) or 2 * pieces.count > num_rows(batch):
                raise
        pieces.count *= 2
        if sums.loss.is_cuda:
            torch.cuda.empty_cache()
    for score in scores:
        sums.add(*score)


def _score(model: nn.Module, batch: Any, loss_fn: LossFunction | None, wide: torch.dtype) -> Score:
    if loss_fn is not None:
        return (*loss_fn(model, batch), None)
    parts = split_batch(batch)
    targets = parts.targets.reshape(-1)  # (N,)
    num_targets = (targets != IGNORE).sum()
    head, _ = linear_head(model)
    if head is not None:
        return _score_hidden(head, hidden_states(model, head, parts), targets, wide)
    logits, loss = call_model(model, parts)
    correct = None
    if loss is None or isinstance(logits, Tensor):
        flat = flat_logits(logits, targets)  # (N, V)
        correct = (flat.argmax(dim=1) == targets).sum()  # an IGNORE target never equals a class id
        if loss is None:
            losses = cross_entropy(flat, targets, ignore_index=IGNORE, reduction="none")
            return losses.to(wide).sum(), num_targets, correct
    return torch.where(num_targets > 0, loss.to(wide) * num_targets, 0.0), num_targets, correct


def _score_hidden(head: OutputHead, hidden: Tensor, targets: Tensor, wide: torch.dtype) -> Score:
    """The same from hidden states (N, D), without ever holding the logits (N, V) of more than a chunk of rows."""
    rows = max(1, _LOGITS_BYTES // (4 * head.weight.size(0)))
    total = torch.zeros((), dtype=wide, device=hidden.device)
    correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
    for start in range(0, targets.numel(), rows):
        logits, wanted = head.logits(hidden[start:start + rows]), targets[start:start + rows]
        correct += (logits.argmax(dim=1) == wanted).sum()
        total += cross_entropy(logits, wanted, ignore_index=IGNORE, reduction="none").to(wide).sum()
    return total, (targets != IGNORE).sum(), correct


@contextlib.contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Each module's own flag is restored: a part that the user froze in eval mode stays there."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def _from_start(dataloader: Any, first: int, every: int) -> Iterator[Iterable[Any]]:
    """One pass from the start; with `every` > 1 the batches at places first, first + every, ..., PASSED at others."""
    if hasattr(dataloader, "from_start"):
        batches = dataloader.from_start() if every == 1 else dealt_from_start(dataloader, first, every)
    else:
        if hasattr(dataloader, "set_epoch"):
            dataloader.set_epoch(0)
        batches = iter(dataloader) if every == 1 else deal(dataloader, first, every)
    try:
        yield batches
    finally:
        close = getattr(batches, "close", None)
        if close is not None:  # a generator left early: whatever it runs in the background ends now
            close()


@contextlib.contextmanager
def _position_kept(dataloader: Any) -> Iterator[None]:
    knows = hasattr(dataloader, "state_dict") and hasattr(dataloader, "load_state_dict")
    position = dataloader.state_dict() if knows else None
    try:
        yield
    finally:
        if knows:
            dataloader.load_state_dict(position)
