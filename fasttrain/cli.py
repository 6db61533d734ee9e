"""The command line: `fasttrain train | eval | generate | verify | inspect | export | report | plan | doctor`. Wiring.

Every flag is a field of one of the dataclasses below or of TrainConfig and GenerationConfig, so a default and its help
stand in one place. Bad input ends with one line on stderr and status 2, a signal with 128 plus its number.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import tyro

from . import __version__
from .amp import choose_policy
from .backend import CPP_PROBLEM, TRITON_PROBLEM, extension, instruction_set
from .checkpointing import latest_checkpoint, list_checkpoints, read_manifest, verify_checkpoint
from .config import GenerationConfig, TrainConfig, load_config
from .data import TokenDataset, TokenLoader, prepare_tokens
from .decoding import Engine
from .export import ExportFormat, describe_checkpoint, export_checkpoint, newest_of
from .flags import visible_defaults
from .generation import generate
from .llama_weights import LLAMA_FAMILY
from .models.gpt import GPT, GPTConfig
from .ops import backend_info
from .optimizations import tune_cpu_memory
from .plan import PlanCommand
from .progress import plot_losses, print_report
from .report import write_report
from .tokenization import Tokenizer
from .trainer import Trainer
from .utils import format_bytes, seed_all

Flat = tyro.conf.arg(name="")  # a nested dataclass's flags, without a prefix


@dataclass(frozen=True, kw_only=True)
class Data:
    """Which text, and how it is cut."""

    data: str
    """A file, a folder, a glob, FILE.jsonl:FIELD, "-" for standard input, or "stdlib": Python's own library source."""
    tokenizer: str = "bpe:4096"
    """bytes; bpe:N, trained on the data; or the path of a tokenizer.json."""
    seq_len: int = 256
    """Tokens per sequence."""
    batch_size: int = 8
    """Sequences per micro-batch."""
    val_fraction: float = 0.05
    """Share of the documents kept for validation."""
    cache: Path = Path(".fasttrain-cache")
    """Where the tokenized data lie, made once."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The size of the model (a GPT: see fasttrain/models/gpt.py)."""

    num_layers: int = 6
    """Decoder blocks."""
    num_heads: int = 6
    """Query heads."""
    num_kv_heads: int = 2
    """Key/value heads, a divisor of num_heads."""
    hidden_size: int = 384
    """Width of the residual stream."""
    dropout: float = 0.0
    """Probability of dropping a value while training."""


_DEFAULTS = TrainConfig(max_steps=1000, warmup_steps=50, lr=1e-3, min_lr=1e-4, eval_every_steps=200,
                        save_every_steps=200)


@dataclass(frozen=True, kw_only=True)
class Train:
    """Trains a GPT on text. The same command again continues where it was; `torchrun --nproc-per-node N -m fasttrain
    train ...` trains on N processes."""

    out: Path
    """Directory of the run: checkpoints, metrics.jsonl, loss.png."""
    data: Annotated[Data, Flat]
    shape: Annotated[Shape, Flat] = field(default_factory=Shape)
    config: Annotated[TrainConfig, Flat] = _DEFAULTS
    config_file: Path | None = None
    """A TOML or JSON file of training options; flags override it."""

    def run(self) -> int:
        train, val = open_data(self.data, self.config.seed)
        seed_all(self.config.seed)  # the weights are drawn below
        shape = dataclasses.asdict(self.shape)
        assert train.vocab_size is not None  # prepare_tokens takes it from the tokenizer
        model = GPT(GPTConfig(vocab_size=train.vocab_size, max_seq_len=self.data.seq_len, **shape))
        trainer = Trainer(
            model=model,
            train_dataloader=TokenLoader(train, self.data.batch_size, seed=self.config.seed),
            val_dataloader=TokenLoader(val, self.data.batch_size, shuffle=False, drop_last=False),
            config=_without_idle_defaults(self.config),
            checkpoint_dir=self.out,
            use_amp=True if self.config.precision == "auto" else None,
        )
        result = trainer.train()
        if not trainer.team.leads:
            return result.exit_code
        report = {
            "validation loss": "none" if result.val_loss is None else f"{result.val_loss:.4f} nats per token",
            "run": str(self.out),
        }
        try:
            report["plot"] = str(plot_losses(self.out / "metrics.jsonl", self.out / "loss.png"))
        except ValueError as reason:
            report["plot"] = f"none: {reason}"
        print_report(f"{result.status} after {result.step} steps", list(report.items()))
        return result.exit_code


def _without_idle_defaults(config: TrainConfig) -> TrainConfig:
    """A short run is not told off for this command's own intervals being longer than it."""
    def fitting(every: int, default: int) -> int:
        return 0 if 0 < config.max_steps < every == default else every

    return dataclasses.replace(config, eval_every_steps=fitting(config.eval_every_steps, _DEFAULTS.eval_every_steps),
                               save_every_steps=fitting(config.save_every_steps, _DEFAULTS.save_every_steps))


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Scores a checkpoint on the validation part of a text: loss, perplexity, bits per byte, accuracy."""

    checkpoint: Path
    """A checkpoint, or the directory of a run (its newest good one)."""
    data: str
    """The text, as for `fasttrain train`."""
    batch_size: int = 8
    """Sequences per batch; changes the speed, not the result."""
    val_fraction: float = 0.05
    """Share of the documents that is the validation part, as in training."""
    seed: int = 0
    """The training run's seed, which divides the documents."""
    cache: Path = Path(".fasttrain-cache")
    """Where the tokenized data lie, made once."""

    def run(self) -> int:
        model, tokenizer, path = open_checkpoint(self.checkpoint)
        data = Data(data=self.data, seq_len=model.config.max_seq_len, val_fraction=self.val_fraction, cache=self.cache)
        _, val = open_data(data, self.seed, tokenizer)
        loader = TokenLoader(val, self.batch_size, shuffle=False, drop_last=False)
        result = Trainer(model=model, val_dataloader=loader, tokenizer=tokenizer).evaluate()
        print_report(f"{path}", [(name, str(value)) for name, value in dataclasses.asdict(result).items()])
        return 0


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Continues a prompt with a checkpoint's model, printing as it goes; several samples when all are done."""

    checkpoint: Path
    """A checkpoint, or the directory of a run (its newest good one)."""
    prompt: str
    """The text to continue."""
    config: Annotated[GenerationConfig, Flat] = GenerationConfig()
    engine: Engine = "auto"
    """native: the C++ decoder (CPU), or an error that says why it cannot serve; eager: the model's own forward."""

    def run(self) -> int:
        model, tokenizer, _ = open_checkpoint(self.checkpoint)
        if self.config.num_samples > 1:
            texts = generate(model, self.prompt, self.config, tokenizer=tokenizer)
            sys.stdout.write("\n---\n".join(self.prompt + text for text in texts) + "\n")
            return 0
        sys.stdout.write(self.prompt)
        for piece in generate(model, self.prompt, self.config, tokenizer=tokenizer, stream=True, engine=self.engine):
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")
        return 0


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Reads every checkpoint of a run and says of each whether it is whole. Status 1 if one is not."""

    directory: tyro.conf.Positional[Path]
    """The directory of a run, or one checkpoint."""

    def run(self) -> int:
        paths = list_checkpoints(self.directory) or [self.directory]
        problems = {path: verify_checkpoint(path) for path in paths}
        for path, found in problems.items():
            print(f"{path}: {'; '.join(found) if found else 'ok'}")
        return int(any(problems.values()))


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Says what a checkpoint holds: step, model, config, sizes, and every tensor's name, shape and type."""

    directory: tyro.conf.Positional[Path]
    """A checkpoint, or the directory of a run (its newest)."""

    def run(self) -> int:
        path = newest_of(self.directory)
        facts, tensors = describe_checkpoint(path)
        print_report(str(path), facts)
        print_report("tensors", tensors)
        return 0


@dataclass(frozen=True, kw_only=True)
class Export:
    """Writes a checkpoint's weights for other programs: a safetensors file, or a folder that from_pretrained loads."""

    directory: tyro.conf.Positional[Path]
    """A checkpoint, or the directory of a run (its newest)."""
    out: Path
    """The file, or the folder."""
    to: ExportFormat = "safetensors"
    """safetensors: the weights alone. hf: config.json, weights, tokenizer: a Hugging Face model or our GPT."""

    def run(self) -> int:
        print(f"written to {export_checkpoint(newest_of(self.directory), self.out, self.to)}")
        return 0


@dataclass(frozen=True, kw_only=True)
class Report:
    """Writes one self-contained HTML page about one run or several: curves, where the time went, samples, events, and
    how their configurations differ."""

    directories: tyro.conf.Positional[tuple[Path, ...]]
    """The directories of the runs."""
    out: Path = Path("report.html")
    """Where the page goes."""

    def run(self) -> int:
        print(f"written to {write_report(self.directories, self.out)}")
        return 0


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Says what runs on this machine, and why not something faster."""

    def run(self) -> int:
        module = extension()
        policy = tune_cpu_memory()
        policy.restore()
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        amp = choose_policy("auto", True, device)
        print_report(
            f"fasttrain {__version__}",
            [
                ("python", f"{platform.python_version()} on {platform.platform()}"),
                ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
                (
                    "device",
                    torch.cuda.get_device_name()
                    if device.type == "cuda"
                    else f"cpu, {os.cpu_count()} cores, {cpu_memory()}",
                ),
                (
                    "extension",
                    CPP_PROBLEM or f"{instruction_set()} of {', '.join(module.available_isas() if module else [])}",
                ),
                ("native decoding", CPP_PROBLEM or f"models.gpt.GPT, {', '.join(LLAMA_FAMILY)} on the CPU"),
                ("triton", TRITON_PROBLEM or "installed"),
                ("precision", f"{str(amp.dtype).removeprefix('torch.')}: {amp.reason}"),
                (policy.name, f"{'usable' if policy.on else 'not usable'}: {policy.reason}"),
            ],
        )
        rows = [
            (f"{op} on {where}", choice.impl + (f": {choice.reason}" if choice.reason else ""))
            for op, devices in backend_info().items()
            for where, choice in devices.items()
        ]
        print_report("implementation that runs", rows)
        return 0


def open_data(data: Data, seed: int, tokenizer: Tokenizer | str | None = None) -> tuple[TokenDataset, TokenDataset]:
    """The (train, validation) data, tokenized if that was not done yet, with a progress line on a terminal."""

    def show(done: int, total: int) -> None:
        if sys.stderr.isatty():
            sys.stderr.write(f"\rtokenizing {done / max(total, 1):.0%} of {format_bytes(total)} ")
            sys.stderr.write("\r\x1b[K" if done >= total else "")

    return prepare_tokens(
        data.data,
        tokenizer or data.tokenizer,
        data.cache,
        seq_len=data.seq_len,
        val_fraction=data.val_fraction,
        seed=seed,
        progress=show,
    )


def open_checkpoint(path: Path) -> tuple[GPT, Tokenizer, Path]:
    """The model and tokenizer of a checkpoint, or of the newest good one of a run."""
    if not path.is_dir():
        raise ValueError(
            f"checkpoint {str(path)!r} is not a directory; pass a run's directory or one of its step-... directories"
        )
    found = (
        path
        if path.name.startswith("step-")
        else latest_checkpoint(path, log=lambda line: print(line, file=sys.stderr))
    )
    if found is None:
        raise ValueError(
            f"{str(path)!r} holds no checkpoint that verifies; `fasttrain verify {path}` says what is wrong"
        )
    metadata = read_manifest(found).metadata
    if metadata.get("model_class") != "GPT" or not isinstance(metadata.get("model_config"), dict):
        raise ValueError(
            f"{str(found)!r} holds a {metadata.get('model_class')}, and this command opens fasttrain's GPT only; "
            "in Python: Trainer(model=...).load_checkpoint(path)"
        )
    model = GPT(GPTConfig(**metadata["model_config"]))
    trainer = Trainer(model=model)
    trainer.load_checkpoint(found)
    if trainer.tokenizer is None:
        raise ValueError(f"{str(found)!r} holds no tokenizer; use the Python API with tokenizer=")
    return model, trainer.tokenizer, found


def cpu_memory() -> str:
    """The machine's memory in words."""
    return format_bytes(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


Command = Train | Eval | Generate | Verify | Inspect | Export | Report | PlanCommand | Doctor
COMMANDS: dict[str, Callable[..., Command]] = {
    "train": Train,
    "eval": Eval,
    "generate": Generate,
    "verify": Verify,
    "inspect": Inspect,
    "export": Export,
    "report": Report,
    "plan": PlanCommand,
    "doctor": Doctor,
}


def main(arguments: list[str] | None = None) -> None:
    """Runs one command; the exit status is the process's."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        command = tyro.extras.subcommand_cli_from_dict(
            with_config_file(arguments), args=arguments, prog="fasttrain", description=__doc__.splitlines()[0],
            registry=visible_defaults(),
        )  # fmt: skip
        status = command.run()
    except (ValueError, OSError) as error:
        if os.environ.get("FASTTRAIN_TRACEBACK") == "1":
            raise
        print(f"fasttrain: error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    raise SystemExit(status)


def with_config_file(arguments: list[str]) -> dict[str, Callable[..., Command]]:
    """The commands, with `train`'s defaults taken from --config-file if it is among the arguments."""
    for index, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name in ("--config-file", "--config_file"):
            config = load_config(value or arguments[min(index + 1, len(arguments) - 1)], TrainConfig)
            train = dataclasses.make_dataclass(
                "Train",
                [("config", Annotated[TrainConfig, Flat], field(default=config))],
                bases=(Train,),
                frozen=True,
                kw_only=True,
            )
            train.__doc__ = Train.__doc__
            return {**COMMANDS, "train": train}
    return COMMANDS
