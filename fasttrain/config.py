"""What a run is made of: two flat, frozen dataclasses, each default declared once.

The command line is generated from these fields, a checkpoint stores them as JSON, and `from_dict` refuses
an unknown key by naming the nearest known one. Nothing here imports torch: configuration is plain data.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_type_hints

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found,unused-ignore]

# What other trainers call the same thing, so that the error for an unknown key names ours.
_OTHER_NAMES = {
    "learning_rate": "lr", "gradient_accumulation_steps": "grad_accum_steps", "num_train_epochs": "max_epochs",
    "epochs": "max_epochs", "steps": "max_steps", "batch_size": "global_batch_size", "clip_grad_norm": "max_grad_norm",
    "lr_scheduler_type": "schedule", "logging_steps": "log_every_steps", "eval_steps": "eval_every_steps",
    "save_steps": "save_every_steps", "eval_on_start": "eval_at_start", "save_total_limit": "keep_last",
    "dtype": "precision", "warmup_ratio": "warmup_steps", "eval_every_tokens": "every_tokens",
    "save_every_tokens": "every_tokens", "log_every_tokens": "every_tokens",
}

_IN_TOKENS = ("log", "eval", "save")

_RECOMPUTED = re.compile(r"none|full|selective|every_([2-9]|[1-9]\d+)", re.ASCII)

ConfigT = TypeVar("ConfigT", "TrainConfig", "GenerationConfig")

Schedule = Literal["cosine", "linear", "constant", "wsd", "inverse_sqrt"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]
StateDtype = Literal["float32", "bfloat16", "int8"]
NonfinitePolicy = Literal["skip", "stop"]
Parallel = Literal["auto", "none", "ddp", "fsdp", "fsdp-vocab", "hsdp"]
FilterOrder = Literal["hf", "llama.cpp", "vllm"]
PenaltyScope = Literal["auto", "all", "new"]
EarlyStopping = Literal["first", "heuristic", "never"]
Speculation = Literal["none", "lookup"]
LongText = Literal["error", "truncate_left", "sliding"]
WeightDtype = Literal["model", "float32", "bfloat16", "int8", "int4"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run. A limit, an interval or a count of 0 means "off"; one step is one optimizer update."""

    max_steps: int = 0
    """Stop after this many optimizer steps (0: no limit)."""
    max_epochs: int = 0
    """Stop after this many passes over the training data (0: no limit)."""
    max_tokens: int = 0
    """Stop once this many target tokens were trained on (0: no limit)."""
    max_seconds: float = 0.0
    """Stop after this much wall-clock time in seconds, this session only (0: no limit)."""
    grad_accum_steps: int = 1
    """Micro-batches per optimizer step."""
    global_batch_size: int = 0
    """Sequences per optimizer step; micro-batches are derived from it (0: use grad_accum_steps)."""
    global_batch_tokens: int = 0
    """Token positions per optimizer step; micro-batches are derived from it (0: use grad_accum_steps)."""
    max_grad_norm: float = 1.0
    """Clip the global gradient norm to this (0: do not clip)."""
    lr: float = 3e-4
    """Peak learning rate, for the optimizer that the Trainer builds when none is passed."""
    min_lr: float = 0.0
    """Learning rate at the end of the schedule."""
    warmup_steps: float = 0
    """Steps over which the learning rate rises linearly from 0 to lr; below 1: this share of the planned steps."""
    schedule: Schedule = "cosine"
    """Shape after the warm-up, for the scheduler that the Trainer builds when none is passed."""
    decay_ratio: float = 0.2
    """schedule='wsd' (warm-up, stable, decay): share of the planned steps, at their end, that the decay takes."""
    weight_decay: float = 0.1
    """Decoupled weight decay; applied to tensors of two or more dimensions only."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment."""
    precision: Precision = "auto"
    """Autocast type; auto picks the fastest reduced precision that this device runs natively, else float32."""
    optimize: Literal["manual", "auto"] = "manual"
    """auto: try torch.compile and fewer threads for a few steps on the real model and data before the run, and keep
    what is faster and gives the same gradients; manual: only what is asked for."""
    compile: bool = False
    """Run the model through torch.compile."""
    activation_checkpointing: str = "none"
    """Recompute activations in the backward instead of keeping them: of every block (full), of every n-th (every_2,
    every_3, ...), of every block but for its matrix products (selective), or of none."""
    optimizer_state_dtype: StateDtype = "float32"
    """How AdamW keeps its moments: 8, 4 or 2 bytes a parameter; the narrow ones round stochastically."""
    log_every_steps: int = 10
    """Steps between two log records; the only moments at which the device is read."""
    eval_every_steps: int = 0
    """Steps between two evaluations (0: only at the end, if there is validation data)."""
    eval_at_start: bool = False
    """Evaluate before step 1 as well."""
    eval_max_batches: int = 0
    """Batches per evaluation (0: all)."""
    save_every_steps: int = 0
    """Steps between two checkpoints (0: only at the end)."""
    every_tokens: dict[str, int] = field(default_factory=dict)
    """Intervals in target tokens in place of steps: {"eval": 2_000_000} takes the place of eval_every_steps, and so for
    "save" and "log". Each falls due at the first step whose count of tokens reaches or passes a multiple."""
    keep_last: int = 2
    """Newest checkpoints to keep (0: all)."""
    keep_best: int = 1
    """Checkpoints of lowest validation loss to keep besides."""
    keep_every_steps: int = 0
    """Keep besides every checkpoint whose step is a multiple of this (0: none)."""
    max_save_failures: int = 0
    """Stop after this many saves in a row that the disk refused (0: never; training goes on, loudly)."""
    nonfinite: NonfinitePolicy = "skip"
    """What a non-finite loss or gradient does: skip that update, or stop the run. Weights are never touched."""
    max_nonfinite_in_a_row: int = 100
    """nonfinite='skip': so many skipped steps one after the other end the run (0: no limit)."""
    preflight: bool = True
    """Check before step 1 that the run can end well: a batch, the disk, the intervals."""
    deterministic: bool = False
    """Ask PyTorch for deterministic algorithms and raise where there is none."""
    seed: int = 0
    """Seed of weights, data order and dropout."""
    parallel: Parallel = "auto"
    """How the model is spread over torchrun's processes. ddp: each holds all of it; fsdp: a part of every parameter,
    gradient and moment; fsdp-vocab: and of the head's classes, which are never gathered; hsdp: fsdp within a machine;
    none: each process by itself; auto: ddp where it fits."""

    def __post_init__(self) -> None:
        _check_types(self)
        for name in ("max_steps", "max_epochs", "max_tokens", "max_seconds", "global_batch_size",
                     "global_batch_tokens", "max_grad_norm", "lr", "min_lr", "warmup_steps", "weight_decay",
                     "eval_every_steps", "eval_max_batches", "save_every_steps", "keep_last", "keep_best", "seed",
                     "max_nonfinite_in_a_row", "keep_every_steps", "max_save_failures"):
            _require(self, name, getattr(self, name) >= 0, "must not be negative")
        for name in ("grad_accum_steps", "log_every_steps"):
            _require(self, name, getattr(self, name) >= 1, "must be at least 1")
        for beta in self.betas:
            _require(self, "betas", 0.0 <= beta < 1.0, "each must lie in [0, 1)")
        _require(self, "min_lr", self.min_lr <= self.lr, f"must not exceed lr={self.lr}")
        for total in ("global_batch_size", "global_batch_tokens"):
            _require(self, "grad_accum_steps", self.grad_accum_steps == 1 or getattr(self, total) == 0,
                     f"derives from {total}={getattr(self, total)}: give one of the two")
        _require(self, "global_batch_tokens", not (self.global_batch_tokens and self.global_batch_size),
                 f"excludes global_batch_size={self.global_batch_size}: give one of the two")
        _require(self, "warmup_steps", self.warmup_steps < 1 or float(self.warmup_steps).is_integer(),
                 "must be a whole number of steps, or a share of them below 1")
        _require(self, "every_tokens", all(key in _IN_TOKENS and each >= 1 for key, each in self.every_tokens.items()),
                 "must give a positive number of tokens for any of log, eval and save, and for nothing else")
        _require(self, "decay_ratio", 0.0 < self.decay_ratio <= 1.0, "must lie in (0, 1]")
        _require(self, "activation_checkpointing", bool(_RECOMPUTED.fullmatch(self.activation_checkpointing)),
                 "must be 'none', 'full', 'selective' or 'every_N' with N of at least 2")


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How text is written. Each token: penalties and bans on the logits, then temperature and filters in the named
    `order`, each filter on the renormalised survivors of the one before, then the draw."""

    max_new_tokens: int = 128
    """Most tokens to add to the prompt."""
    min_new_tokens: int = 0
    """Fewest tokens: until then no end-of-text token is drawn and no stop string counts."""
    num_samples: int = 1
    """Texts to write for each prompt."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token."""
    top_k: int = 0
    """Keep the k most likely tokens (0: all)."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens whose probability reaches this (1: all)."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as likely as the most likely one (0: all)."""
    typical_p: float = 1.0
    """Keep the tokens whose surprise is closest to the expected one, up to this probability (1: all)."""
    epsilon: float = 0.0
    """Keep tokens of at least this probability; the most likely always stays (0: all)."""
    xtc_probability: float = 0.0
    """Chance per token that all but the least likely of the tokens above xtc_threshold are removed (0: off)."""
    xtc_threshold: float = 0.1
    """Probability from which xtc_probability counts a token as a top choice."""
    order: FilterOrder = "hf"
    """hf: temperature, top-k, top-p, min-p, typical, epsilon, XTC. vllm: min-p before top-k. llama.cpp: top-k, typical,
    top-p, min-p, epsilon, XTC, temperature last."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in the prompt or the new text (1: off)."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each time it is in the new text."""
    presence_penalty: float = 0.0
    """Subtracted from a token's logit if it is in the new text."""
    penalty_scope: PenaltyScope = "auto"
    """Text that the three penalties look at; auto: repetition all of it, frequency and presence the new part."""
    dry_multiplier: float = 0.0
    """DRY: where the last L >= dry_allowed_length tokens stood before, the token that came next there loses
    dry_multiplier * dry_base ^ (L - dry_allowed_length) (0: off)."""
    dry_base: float = 1.75
    """Growth of DRY's penalty for each token of a longer repeat."""
    dry_allowed_length: int = 2
    """Tokens from which DRY counts a repeat."""
    dry_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    """Texts over which DRY sees no repeat."""
    no_repeat_ngram: int = 0
    """No sequence of this many tokens appears twice, prompt included (0: off)."""
    banned_tokens: tuple[int, ...] = ()
    """Token ids that are never drawn."""
    logit_bias: dict[int, float] = field(default_factory=dict)
    """Added to the logit of each token id named, before everything else."""
    num_beams: int = 1
    """Texts kept side by side by beam search, which draws nothing (1: no beam search)."""
    length_penalty: float = 1.0
    """Beam search ranks by log-probability / length ^ this."""
    early_stopping: EarlyStopping = "heuristic"
    """When beam search ends. first: num_beams texts are finished; heuristic: none of the open ones would win at its
    present length; never: none could win at any length."""
    speculation: Speculation = "none"
    """lookup: guess tokens by the latest repeat in the text and check them in one model call; same text, sooner."""
    num_draft_tokens: int = 8
    """Most tokens that speculation guesses at a time."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; they are not part of it."""
    eos_token_id: int | tuple[int, ...] | None = None
    """Token or tokens that end the text (None: the tokenizer's, if it has one; an empty list: none)."""
    long_text: LongText = "error"
    """Prompt and max_new_tokens beyond the context. truncate_left: keep the prompt's end; sliding: forget the oldest
    half whenever the context is full."""
    seed: int | tuple[int, ...] = 0
    """Seed of the draw; text i of the batch uses seed + i (sample j of prompt i is text i * num_samples + j). Several:
    one for each text."""
    weight_dtype: WeightDtype = "model"
    """How the native engine (CPU) stores the matrices. bfloat16; int8: a scale for each 64 weights; int4: a scale and a
    least value for each 32, embedding and head int8. Read in 1/2, 1/4 and 1/6 of float32's time. model: as they are."""

    def __post_init__(self) -> None:
        if isinstance(self.logit_bias, Mapping):  # JSON and TOML have no keys but strings
            object.__setattr__(self, "logit_bias", {_token_id(key): bias for key, bias in self.logit_bias.items()})
        _check_types(self)
        for name in ("max_new_tokens", "num_samples", "num_beams", "num_draft_tokens", "dry_allowed_length"):
            _require(self, name, getattr(self, name) >= 1, "must be at least 1")
        _require(self, "min_new_tokens", 0 <= self.min_new_tokens <= self.max_new_tokens,
                 f"must lie in [0, max_new_tokens={self.max_new_tokens}]")
        _require(self, "temperature", self.temperature >= 0, "must not be negative (0 is greedy)")
        _require(self, "top_k", self.top_k >= 0, "must not be negative (0 keeps all)")
        for name in ("top_p", "typical_p"):
            _require(self, name, 0.0 < getattr(self, name) <= 1.0, "must lie in (0, 1]")
        for name in ("min_p", "xtc_probability", "xtc_threshold"):
            _require(self, name, 0.0 <= getattr(self, name) <= 1.0, "must lie in [0, 1]")
        _require(self, "epsilon", 0.0 <= self.epsilon < 1.0, "must lie in [0, 1)")
        _require(self, "repetition_penalty", self.repetition_penalty > 0, "must be positive (1 is off)")
        _require(self, "dry_multiplier", self.dry_multiplier >= 0, "must not be negative (0 is off)")
        _require(self, "dry_base", self.dry_base >= 1, "must be at least 1")
        _require(self, "no_repeat_ngram", self.no_repeat_ngram >= 0, "must not be negative (0 is off)")
        for name in ("stop", "dry_breakers"):
            _require(self, name, all(getattr(self, name)), "must not hold an empty string")
        for seed in self.seed if isinstance(self.seed, tuple) else (self.seed,):
            _require(self, "seed", 0 <= seed < 2**63, "must lie in [0, 2^63)")
        self._refuse_contradictions()

    def _refuse_contradictions(self) -> None:
        """Two fields that cannot both be meant."""
        draws = {"typical_p": 1.0, "xtc_probability": 0.0, "num_samples": 1}
        if self.temperature == 0:  # top_k, top_p, min_p and epsilon always keep the likeliest, so they may stay
            for name, off in draws.items():
                _require(self, name, getattr(self, name) == off, "needs a draw, but temperature=0 takes the likeliest "
                         f"token: set temperature > 0, or {name}={off}")
        if self.num_beams > 1:
            alone: dict[str, Any] = {**draws, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "epsilon": 0.0, "stop": (),
                                     "speculation": "none", "dry_multiplier": 0.0}
            for name, off in alone.items():
                _require(self, name, getattr(self, name) == off, f"cannot be joined with num_beams={self.num_beams}: "
                         f"beam search keeps the likeliest texts, draws nothing and compares token ids; set {name}="
                         f"{off!r} or num_beams=1")
            _require(self, "temperature", self.temperature in (0.0, 1.0), f"means nothing with num_beams="
                     f"{self.num_beams}, which draws nothing; leave it out, or set num_beams=1")
            _require(self, "long_text", self.long_text != "sliding", f"cannot be sliding with num_beams="
                     f"{self.num_beams}; use truncate_left")
        elif self.early_stopping != "heuristic" or self.length_penalty != 1.0:
            name = "length_penalty" if self.length_penalty != 1.0 else "early_stopping"
            _require(self, name, False, "acts on beam search only; set num_beams > 1 or leave it out")


def from_dict(cls: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
    """Builds a config from plain data; raises ValueError naming the nearest field for an unknown key."""
    known: list[str] = [known.name for known in dataclasses.fields(cls)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), [*known, *_OTHER_NAMES], n=1, cutoff=0.5)
            near = [_OTHER_NAMES.get(name, name) for name in near if _OTHER_NAMES.get(name, name) in known]
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise ValueError(f"{cls.__name__} has no field {key!r}; {hint}")
    arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return cls(**arguments)


def load_config(source: ConfigT | Mapping[str, Any] | str | Path | None, cls: type[ConfigT]) -> ConfigT:
    """Accepts a config, a mapping, the path of a .toml or .json file, or None (all defaults)."""
    if source is None:
        return cls()
    if isinstance(source, cls):
        return source
    if isinstance(source, Mapping):
        return from_dict(cls, source)
    if isinstance(source, (str, Path)):
        return from_dict(cls, _read_table(Path(source)))
    raise ValueError(f"config is a {type(source).__name__}; pass a {cls.__name__}, a dict or a path")


def to_dict(config: TrainConfig | GenerationConfig) -> dict[str, Any]:
    """The config as JSON-ready data; `from_dict` reads it back to an equal config."""
    plain = dataclasses.asdict(config)
    return {key: _plain(value) for key, value in plain.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): item for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _read_table(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise ValueError(f"config file {str(path)!r} does not exist; pass a .toml or .json file, a dict or a config")
    if path.suffix not in (".toml", ".json"):
        raise ValueError(f"config file {str(path)!r} ends in {path.suffix!r}; it must be .toml or .json")
    text = path.read_text(encoding="utf-8")
    try:
        table = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except ValueError as error:
        raise ValueError(f"config file {str(path)!r} does not parse: {error}") from error
    if not isinstance(table, Mapping):
        raise ValueError(f"config file {str(path)!r} holds a {type(table).__name__}; it must hold one table of fields")
    return table


def _require(config: Any, name: str, holds: bool, rule: str) -> None:
    if not holds:
        raise ValueError(f"{type(config).__name__}.{name} is {getattr(config, name)!r}; it {rule}")


def _check_types(config: Any) -> None:
    """Refuses a value of another type than its field's, so that a typo in a file fails here and not in step 900."""
    hints = get_type_hints(type(config))
    for declared in dataclasses.fields(config):
        name = declared.name
        value, hint = getattr(config, name), hints[name]
        choices = get_args(hint) if getattr(hint, "__origin__", None) is Literal else None
        whole = _is_whole(value)
        if choices is not None:
            _require(config, name, value in choices, f"must be one of {', '.join(map(repr, choices))}")
        elif hint is bool:
            _require(config, name, isinstance(value, bool), "must be true or false")
        elif hint is str:
            _require(config, name, isinstance(value, str), "must be a string")
        elif hint is int:
            _require(config, name, whole, "must be a whole number")
        elif hint is float:
            _require(config, name, _is_finite_number(value), "must be a finite number")
        elif hint == tuple[float, float]:
            pair = isinstance(value, tuple) and len(value) == 2 and all(map(_is_finite_number, value))
            _require(config, name, pair, "must hold two numbers")
        elif hint == tuple[str, ...]:
            texts = isinstance(value, tuple) and all(isinstance(text, str) for text in value)
            _require(config, name, texts, "must hold strings")
        elif hint == tuple[int, ...]:
            _require(config, name, isinstance(value, tuple) and all(map(_is_whole, value)), "must hold whole numbers")
        elif hint == int | tuple[int, ...]:
            whole = whole or (isinstance(value, tuple) and bool(value) and all(map(_is_whole, value)))
            _require(config, name, whole, "must be a whole number, or hold whole numbers")
        elif hint == int | tuple[int, ...] | None:
            whole = whole or value is None or (isinstance(value, tuple) and all(map(_is_whole, value)))
            _require(config, name, whole, "must be a whole number or None, or hold whole numbers")
        elif hint == dict[str, int]:
            pairs = isinstance(value, dict) and all(isinstance(k, str) and _is_whole(v) for k, v in value.items())
            _require(config, name, pairs, "must map names to whole numbers")
        elif hint == dict[int, float]:
            pairs = isinstance(value, dict) and all(_is_whole(k) and _is_finite_number(v) for k, v in value.items())
            _require(config, name, pairs, "must map whole numbers to finite numbers")
        else:
            raise AssertionError(f"{name}: no check for {hint}")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _token_id(key: object) -> object:
    return int(key) if isinstance(key, str) and key.isdecimal() else key


def _is_finite_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
