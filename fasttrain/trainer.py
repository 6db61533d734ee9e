"""Trainer: from a model and its parts to a run. It wires and checks; the loop is in training_loop.py.

    Trainer(model=model, train_dataloader=loader, config=TrainConfig(max_steps=1000), checkpoint_dir="run").train()

Everything but the model is optional: without an optimizer it builds AdamW, without a scheduler the one the config
names, and what needs a part that is missing says so. The same command run again continues where it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from . import assembly, summary
from .amp import choose_policy
from .averaging import averaged_weights
from .batch_stream import BatchStream, peek_batches
from .callbacks import Hooks, Run
from .checkpointing import list_checkpoints, load_checkpoint, read_manifest
from .config import TrainConfig, load_config
from .distributed import ALONE, join
from .evaluation import EvalResult, Pieces, evaluate
from .export import load_weights
from .generation import generate
from .losses import LossFunction, batch_loss, check_is_causal
from .optimizations import Optimization, apply_optimizations, kept_memory, optimizer_switches
from .parallel import spread_model
from .preflight import PreflightReport, preflight
from .progress import Progress, print_report
from .replicas import Spread, Whole
from .result import TrainResult
from .resume_rules import compare_configs
from .saver import CheckpointSaver
from .schedules import build_scheduler
from .session import Session
from .shard_files import trees_of_rank
from .sharding import prepare_optimizer
from .state import TrainState, load_model
from .storage import lock_directory
from .throughput import flops_per_token, peak_flops
from .tokenization import tokenizer_from_dict
from .training_loop import Parts, settle
from .tuning import tune
from .utils import Interruption, PhaseClock, format_duration, preserve_rng, rank_seed, seed_all, unwrap
from .verification import Verification, verify_batch_math, verify_resume

__all__ = ["TrainResult", "Trainer"]


class Trainer:
    """Holds the parts of a run between calls. See the module's docstring and `TrainConfig`.

    Args:
        model: any nn.Module that returns logits, (logits, loss), or an object or dict with `.logits`/`.loss`.
        train_dataloader, val_dataloader: any iterables of batches (see `losses.py` for the forms of a batch);
            val_dataloader may be a dict of named ones, the first of which decides about the best checkpoint.
        optimizer, scheduler: any of torch's; built from the config if None.
        config: TrainConfig, a dict of its fields, or the path of a TOML or JSON file.
        checkpoint_dir: where checkpoints, metrics.jsonl and samples go; None writes nothing.
        use_amp: True: the best reduced precision that is faster on this device; False: float32; None: as
            `config.precision` says.
        loss_fn: (model, batch) -> (loss_sum, num_targets), instead of next-token cross-entropy.
        tokenizer: for text in and out; default: the training data's, else the model's.
        callbacks: see `callbacks.py`; progress and metrics.jsonl come by themselves.
    """

    def __init__(self, model: nn.Module, train_dataloader: Iterable[Any] | None = None,
                 val_dataloader: Iterable[Any] | None = None, optimizer: Optimizer | None = None,
                 scheduler: LRScheduler | None = None,
                 config: TrainConfig | Mapping[str, Any] | str | Path | None = None,
                 checkpoint_dir: str | Path | None = None, use_amp: bool | None = None, *,
                 loss_fn: LossFunction | None = None, tokenizer: Any = None, callbacks: Sequence[Any] = ()) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(f"model is a {type(model).__name__}; it must be a torch.nn.Module")
        if scheduler is not None and optimizer is None:
            raise ValueError("scheduler was passed without the optimizer that it drives; pass optimizer= too")
        self.config: TrainConfig = load_config(config, TrainConfig)
        self.team = ALONE if self.config.parallel == "none" else join()
        self.model, self.device = assembly.place_model(model, self.team)
        self.train_dataloader, self.val_dataloader = train_dataloader, val_dataloader
        self.optimizer, self.scheduler, self.loss_fn = optimizer, scheduler, loss_fn
        if loss_fn is None:
            check_is_causal(unwrap(model))
        if optimizer is not None:
            assembly.check_optimizer(model, optimizer, scheduler)
        self.amp = choose_policy(self.config.precision, use_amp, self.device)
        self.checkpoint_dir = None if checkpoint_dir is None else Path(checkpoint_dir)
        self.tokenizer = assembly.find_tokenizer(tokenizer, train_dataloader, unwrap(model))
        self.callbacks = list(callbacks)
        self.progress = Progress()
        self.optimizations: list[Optimization] = []
        self.resumed_from: Path | None = None
        """The checkpoint directory whose state this trainer continues, or None."""
        self.spread: Spread = Whole()
        """How the model is spread over the ranks, decided when the state is built."""
        self.state: TrainState | None = None
        """Built at the first need; None until then."""
        self._checkpoint: Path | None = None
        self._saver: CheckpointSaver | None = None
        self._eval_pieces = Pieces()
        self._tuned = False
        Hooks(self.callbacks)  # refuses what is no callback now rather than in train()

    def train(self, resume: str | Path | bool | None = "auto") -> TrainResult:
        """Trains until a limit of the config, a callback or a signal ends it; the checkpoint is written then.

        Args:
            resume: "auto" continues the newest good checkpoint in `checkpoint_dir`, if any; a path continues that
                one; False or None starts afresh (in a directory without checkpoints).

        Raises:
            ValueError: something is missing or does not fit; nothing was trained then.
        """
        if self.train_dataloader is None:
            raise ValueError("train() needs data, and train_dataloader is None; pass it to the Trainer")
        assembly.check_limits(self.config)
        interruption, clock = Interruption(), PhaseClock()
        with contextlib.ExitStack() as stack:
            stack.enter_context(interruption.watch())
            if self.checkpoint_dir is not None and self.team.leads:
                self.checkpoint_dir.mkdir(parents=True, exist_ok=True)
                stack.enter_context(lock_directory(self.checkpoint_dir))
            if self.config.deterministic:
                stack.enter_context(assembly.deterministic_algorithms())
            stack.enter_context(kept_memory(self.device))
            state = self._ready_state(resume)
            if self.config.optimize == "auto" and not self._tuned:
                self._tune(state)
            if self.team.is_alone:
                state.stream.waiting = interruption.breakable
            stack.callback(setattr, state.stream, "waiting", contextlib.nullcontext)
            self._print_startup(state, self.preflight() if self.config.preflight else None)
            clock.mark("startup")
            status = self._run(state, interruption, clock)
        return self._finish(state, status, interruption, clock)

    def evaluate(self, dataloader: Iterable[Any] | None = None) -> EvalResult:
        """Scores the model on `dataloader` (default: val_dataloader); training state is left as it is."""
        return self._evaluate(dataloader, None)

    def generate_text(self, prompt: Any, max_new_tokens: int | None = None, temperature: float | None = None,
                      **options: Any) -> Any:
        """Continues a prompt: str -> str, list of str -> list of str. Options are GenerationConfig's fields.

        Private randomness and eval mode: calling it in the middle of a run changes nothing in the training.
        """
        if self.tokenizer is None:
            raise ValueError("generate_text needs a tokenizer; pass Trainer(..., tokenizer=...), or data or a model "
                             "with a .tokenizer, or load a checkpoint that holds one")
        given = {"max_new_tokens": max_new_tokens, "temperature": temperature}
        options.update({name: value for name, value in given.items() if value is not None})
        with averaged_weights(self.callbacks):
            return self.spread.within(generate, unwrap(self.model), prompt, tokenizer=self.tokenizer, **options)

    def save_checkpoint(self) -> Path:
        """Writes the whole training state to `checkpoint_dir` and returns the checkpoint's directory."""
        if self.checkpoint_dir is None:
            raise ValueError("save_checkpoint() needs a place, and checkpoint_dir is None; pass Trainer(..., "
                             "checkpoint_dir=...)")
        if self.train_dataloader is None:
            raise ValueError("save_checkpoint() saves a training state, and there is none without train_dataloader")
        state = self._built_state()
        settle(state, self._resolved(), Parts())
        saver = self._saver or CheckpointSaver(self.checkpoint_dir, self.config, log=self.progress.log, team=self.team)
        saver.save(state.step, trees_of_rank(state.capture(), self.team), self._metadata(state), wait=True)
        if saver.newest is None or saver.failures:
            raise OSError(f"step {state.step} could not be saved in {str(self.checkpoint_dir)!r}: see the warning")
        self._checkpoint = saver.newest
        return saver.newest

    def load_checkpoint(self, path: str | Path) -> Path:
        """Loads a checkpoint (or the newest good one, if `path` holds several): the whole training state if there
        is a train_dataloader, else the weights alone; of a .safetensors file, its weights. Returns what was loaded."""
        path = Path(path)
        if path.suffix == ".safetensors" and path.is_file():
            load_model(unwrap(self.model), load_weights(path))
            return path
        if not path.is_dir():
            raise ValueError(f"checkpoint {str(path)!r} is not a directory; pass a step-... directory or the "
                             "checkpoint_dir that holds them")
        if not path.name.startswith("step-"):
            newest = self._newest(path)
            if newest is None:
                raise ValueError(f"{str(path)!r} holds no checkpoint that verifies")
            path = newest
        if self.train_dataloader is not None:
            self._restore(self._built_state(), path)
        else:
            load_model(unwrap(self.model), load_checkpoint(path, ("model",))["model"])
            self._adopt_metadata(read_manifest(path).metadata)
        self.resumed_from = path
        return path

    def preflight(self) -> PreflightReport:
        """Checks in seconds whether the run can end well: a training batch forward and backward, an evaluation batch,
        the disk, the limits and intervals. Raises where it cannot; changes nothing. `train()` does it by itself."""
        config = self._resolved()
        one = None if self.val_dataloader is None else lambda: self._evaluate(None, None, max_batches=1)
        state = self._built_state()
        parts = dataclasses.replace(self._parts(), loss_fn=self.spread.loss(self.loss_fn or batch_loss, alone=True))
        return preflight(state, config, parts, checkpoint_dir=self.checkpoint_dir,
                         evaluate_one=one,
                         num_eval_batches=assembly.eval_batches(self.val_dataloader, config.eval_max_batches))

    def verify_resume(self, steps: int = 4) -> Verification:
        """Proves on this model and data that a resumed run is the same run, bit for bit; puts everything back. All
        ranks call it, and get the same."""
        state = self._built_state()
        parts = dataclasses.replace(self._parts(), reduce=self.spread.reduce, norm=self.spread.norm)
        return self._told(verify_resume(state, self._resolved(), parts, steps, self.checkpoint_dir))

    def verify_batch_math(self, num_parts: int = 0) -> Verification:
        """Proves on this model and the first training batch that micro-batches give the gradients of the whole, those
        that several ranks compute included."""
        state = self._built_state()
        with preserve_rng():
            seed_all(self.config.seed)  # ranks that shuffle draw alike
            batches = peek_batches(self._data, 1)
        if not batches:
            raise ValueError("verify_batch_math() needs a train_dataloader that yields a batch and can be read again")
        tolerance = 1e-4 if self.amp.dtype == torch.float32 else 5e-2
        loss = self.spread.loss(self.loss_fn or batch_loss, alone=True)
        return self._told(verify_batch_math(state, self.spread, loss, batches[0], num_parts=num_parts,
                                            autocast=self.amp.autocast, tolerance=tolerance))

    def _told(self, outcome: Verification) -> Verification:
        self.progress.log(f"{'verified' if outcome.ok else 'NOT verified'}: {outcome.summary}")
        return outcome

    def _parts(self) -> Parts:
        return Parts(loss_fn=self.spread.loss(self.loss_fn or batch_loss), autocast=self.amp.autocast)

    @functools.cached_property
    def _with_accumulation(self) -> TrainConfig:
        return assembly.resolve_accumulation(self.config, self._data, self.team.world_size)

    @property
    def _data(self) -> Iterable[Any]:
        """The training batches, none without a loader; an empty loader is false, and still the one to name."""
        return () if self.train_dataloader is None else self.train_dataloader

    def _resolved(self) -> TrainConfig:
        return self._with_accumulation

    def _built_state(self) -> TrainState:
        if self.state is None:
            config, loader = self._resolved(), self._data
            model, self.optimizations = apply_optimizations(
                self.model, config, self.device, own_loss=self.loss_fn is not None, loader=loader)
            self.spread, how = spread_model(
                model, config, self.team, lambda: self.amp.autocast(), self.optimizer, self.amp.needs_scaler)
            optimizer = self.optimizer or assembly.build_optimizer(self.model, config)
            prepare_optimizer(optimizer, self.spread)
            self.optimizations += [Optimization("parallel", not self.team.is_alone, how)]
            self.optimizations += optimizer_switches(optimizer)
            scheduler = self.scheduler or build_scheduler(
                optimizer, config, assembly.planned_steps(config, loader, self.team.world_size) or 0)
            stream = BatchStream(loader, max_epochs=config.max_epochs, log=self.progress.log, team=self.team)
            stateful = [callback for callback in self.callbacks if hasattr(callback, "state_dict")]
            self.state = TrainState(model, optimizer, stream, scheduler, self.amp.build_scaler(), stateful, self.team)
            self.spread.begin(self.state)
        return self.state

    def _ready_state(self, resume: str | Path | bool | None) -> TrainState:
        fresh = self.state is None
        state = self._built_state()
        explicit = isinstance(resume, (str, Path)) and resume != "auto"
        if explicit:
            self.load_checkpoint(str(resume))
        root = self.checkpoint_dir
        newest = self._newest(root)
        if fresh and not explicit:
            if newest is not None and resume:
                self.load_checkpoint(newest)
            elif newest is not None or (root is not None and self.team.leads and list_checkpoints(root)):
                what = "" if newest is not None else ", none of which verifies"
                raise ValueError(f"checkpoint_dir {str(root)!r} holds checkpoints{what}, and a fresh run would mix "
                                 "with them; choose another directory, move them away, or use resume='auto'")
            else:
                seed_all(rank_seed(self.config.seed, self.team.rank))
        elif newest is not None and read_manifest(newest).step > state.step:
            raise ValueError(f"the run would continue at step {state.step}, but checkpoint_dir {str(root)!r} holds "
                             f"{newest.name}, which the next resume would take instead; move it away or choose "
                             "another checkpoint_dir")
        state.stop_reason = ""
        return state

    def _newest(self, root: Path | None) -> Path | None:
        return None if root is None else assembly.newest_checkpoint(root, self.team, log=self.progress.log)

    def _restore(self, state: TrainState, path: Path) -> None:
        metadata = read_manifest(path).metadata
        saved = metadata.get("config", {})
        changes = compare_configs(saved, self.config, own_optimizer=self.optimizer is not None)  # refuses, or tells
        self._adopt_metadata(metadata)
        assembly.restore(state, path)
        for change in changes:
            self.progress.log(f"config changed since the checkpoint: {change}")
        if self.optimizer is None:
            assembly.adopt_hyperparameters(state.optimizer, saved, self.config)
        if isinstance(state.scheduler, LambdaLR) and self.scheduler is None:
            assembly.re_anchor(state.scheduler, saved.get("lr"), self.config.lr if self.optimizer is None else None)
        self._checkpoint = path

    def _adopt_metadata(self, metadata: Mapping[str, Any]) -> None:
        if self.tokenizer is None and metadata.get("tokenizer") is not None:
            self.tokenizer = tokenizer_from_dict(metadata["tokenizer"])
        saved = metadata.get("precision")
        if self.config.precision == "auto" and saved is not None and saved != str(self.amp.dtype):
            self.progress.log(f"precision: {saved} as the checkpoint was trained, not {self.amp.dtype} "
                              f"({self.amp.reason})")
            self.amp = dataclasses.replace(self.amp, dtype=getattr(torch, saved.removeprefix("torch.")),
                                           reason="as in the checkpoint", needs_scaler=saved == "torch.float16")

    def _evaluate(self, dataloader: Iterable[Any] | None, interruption: Interruption | None,
                  max_batches: int | None = None, asked: Callable[[], bool] | None = None) -> EvalResult:
        loader = dataloader if dataloader is not None else self.val_dataloader
        if loader is None:
            raise ValueError("evaluate() needs data: pass a dataloader, or Trainer(..., val_dataloader=...)")
        with averaged_weights(self.callbacks):
            return evaluate(unwrap(self.model), loader, loss_fn=self.loss_fn, device=self.device,
                            autocast=self.amp.autocast, pieces=self._eval_pieces,
                            max_batches=self.config.eval_max_batches if max_batches is None else max_batches,
                            interrupted=asked, team=self.team,
                            within=None if self.team.is_alone else self.spread.within,
                            waiting=contextlib.nullcontext if interruption is None else interruption.breakable)

    def _run(self, state: TrainState, interruption: Interruption, clock: PhaseClock) -> str:
        config, team, spread = self._resolved(), self.team, self.spread
        session = Session(
            state, config, self.config, self._parts(), team, spread, self.checkpoint_dir, self.callbacks, self.progress,
            interruption, clock, None if self.val_dataloader is None else
            lambda asked: self._evaluate(None, interruption if team.is_alone else None, asked=asked),
            self._metadata, self._checkpoint)
        continued = self.resumed_from is not None or state.step > 0 or state.window.micro_step > 0
        describe = functools.partial(
            Run, config, self.checkpoint_dir if team.leads else None, state.step if continued else None,
            assembly.planned_steps(config, self._data, team.world_size), self.progress.log,
            None if self.tokenizer is None else assembly.breakable_generation(
                unwrap(self.model), self.tokenizer, interruption if team.is_alone else Interruption(), self.callbacks,
                spread.within),
            loss_fn=self._loss, peak_flops=peak_flops(self.device, self.amp.dtype),
            flops_per_token=flops_per_token(self.model, assembly.batch_shape(self._data)[1]),
            checkpoint=lambda: session.checkpoint, team=team)
        self._saver = session.saver
        try:
            return session.run(lambda report: describe(report=report))
        finally:
            self._saver, self._checkpoint = None, session.checkpoint

    def _metadata(self, state: TrainState) -> dict[str, Any]:
        return assembly.checkpoint_metadata(state, self.config, self.amp.dtype, self.tokenizer)

    def _loss(self, model: nn.Module, batch: Any) -> Any:
        with self.amp.autocast():
            return (self.loss_fn or batch_loss)(model, batch)

    def _tune(self, state: TrainState) -> None:
        self._tuned = True
        if not self.team.is_alone:
            self.progress.log("optimize='auto' tries nothing under several ranks, which might choose differently")
            return
        batches = peek_batches(state.stream.loader, 1)
        if batches:
            state.model, decisions = tune(state.model, batches[0], self._parts(), log=self.progress.log)
            tried = {decision.name for decision in decisions}
            self.optimizations = [*(item for item in self.optimizations if item.name not in tried), *decisions]

    def _print_startup(self, state: TrainState, checked: PreflightReport | None) -> None:
        rows = summary.startup_rows(state, self._resolved(), self.amp, self.resumed_from, self.optimizations, checked)
        print_report(f"fasttrain: {type(unwrap(self.model)).__name__}", rows, self.progress.stream)

    def _finish(self, state: TrainState, status: str, interruption: Interruption, clock: PhaseClock) -> TrainResult:
        served = ""
        reason = state.stop_reason or state.stream.end_reason or "the limit of the config was reached"
        if status == "interrupted":
            reason = f"{interruption.requested}; run the same command again to continue"
            served = f"{interruption.requested}, {'checkpoint durable' if self._checkpoint else 'left'} " \
                     f"{format_duration(interruption.seconds)} later"
        exit_code = 128 + getattr(signal, interruption.requested) if status == "interrupted" else 0
        result = summary.result_of(state, status, reason, self._checkpoint, clock.seconds, exit_code)
        print_report(f"{status} at step {state.step}: {reason}", summary.end_rows(result, served), self.progress.stream)
        return result
