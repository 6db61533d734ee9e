"""One training run of one contender in a process of its own, as a user would run it; prints what it measured as JSON.

    python -m bench.training_contenders --contender fasttrain --model llama --steps 6

Contenders: a hand-written PyTorch loop (fused AdamW, clipping), the Trainers of transformers and Lightning, fasttrain,
`auto`: fasttrain with optimize="auto", `gemm`: nothing but the step's matrix products, under fasttrain's memory policy,
and `bare`: forward and backward without a loop around them. All train the same weights on the same batches with the
same optimizer, so their losses must agree.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench.common import status_kib

BETAS, LR, DECAY, CLIP = (0.9, 0.95), 3e-4, 0.1, 1.0


class Shape:
    """tiny: what is left is the loop; real: 49 M parameters at V=50304, 14 M at V=4096."""

    def __init__(self, size: str, vocab: int) -> None:
        self.vocab = vocab
        self.layers, self.width, self.inner, self.heads = (1, 32, 64, 2) if size == "tiny" else (6, 384, 1024, 6)
        self.rows, self.length = (4, 16) if size == "tiny" else (8, 256)

    def model(self, kind: str) -> nn.Module:
        torch.manual_seed(0)
        if kind == "gpt":
            from fasttrain.models.gpt import GPT, GPTConfig

            return GPT(GPTConfig(vocab_size=self.vocab, num_layers=self.layers, num_heads=self.heads,
                                 hidden_size=self.width, intermediate_size=self.inner, max_seq_len=self.length,
                                 tie_embeddings=False))
        from transformers import LlamaConfig, LlamaForCausalLM

        return LlamaForCausalLM(LlamaConfig(
            vocab_size=self.vocab, hidden_size=self.width, intermediate_size=self.inner, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, num_key_value_heads=self.heads, max_position_embeddings=self.length,
            tie_word_embeddings=False))

    def rows_of_data(self, steps: int) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randint(0, self.vocab, (steps * self.rows, self.length), generator=generator)


class Stopwatch:
    """When each step ended, and how long clipping and updating took in between."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.update = [0.0]
        self.losses: list[float] = []
        self.decisions: list[str] = []

    def step(self) -> None:
        self.ends.append(time.perf_counter())
        self.update.append(0.0)

    def timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.update[-1] += time.perf_counter() - start
        return run


def logits_loss(model: nn.Module, ids: Tensor) -> Tensor:
    output = model(ids)
    logits = output.logits if hasattr(output, "logits") else output
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def torch_optimizer(model: nn.Module, watch: Stopwatch) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, weight_decay=DECAY, fused=True)
    optimizer.step = watch.timed(optimizer.step)  # type: ignore[method-assign]
    return optimizer


def run_hand(shape: Shape, kind: str, steps: int, watch: Stopwatch) -> None:
    model, data = shape.model(kind), shape.rows_of_data(steps)
    optimizer = torch_optimizer(model, watch)
    clip, zero = watch.timed(nn.utils.clip_grad_norm_), watch.timed(optimizer.zero_grad)
    model.train()
    for ids in data.split(shape.rows):
        loss = logits_loss(model, ids)
        loss.backward()
        clip(model.parameters(), CLIP)
        optimizer.step()
        zero()
        watch.losses.append(loss.item())
        watch.step()


def run_fasttrain(shape: Shape, kind: str, steps: int, watch: Stopwatch, optimize: Any = "manual") -> None:
    from fasttrain import Callback, TrainConfig, Trainer

    class Watch(Callback):
        booked = 0.0

        def on_step(self, state: Any) -> None:
            seconds = clock.seconds.get("optimizer", 0.0)
            watch.update[-1], self.booked = seconds - self.booked, seconds
            watch.losses.append(state.counters.last_loss)
            watch.step()

    model, data = shape.model(kind), shape.rows_of_data(steps)
    config = TrainConfig(max_steps=steps, lr=LR, betas=BETAS, weight_decay=DECAY, schedule="constant",
                         max_grad_norm=CLIP, precision="float32", preflight=False, optimize=optimize)
    with tempfile.TemporaryDirectory() as folder:
        import fasttrain.trainer as module

        clock = module.PhaseClock()
        module.PhaseClock = lambda: clock  # type: ignore[assignment, misc]
        trainer = Trainer(model=model, train_dataloader=list(data.split(shape.rows)), config=config,
                          checkpoint_dir=folder, callbacks=[Watch()])
        trainer.train()
        watch.decisions = [f"{item.name} {'on' if item.on else 'off'}: {item.reason}" for item in trainer.optimizations]


def run_auto(shape: Shape, kind: str, steps: int, watch: Stopwatch) -> None:
    run_fasttrain(shape, kind, steps, watch, "auto")


def run_transformers(shape: Shape, kind: str, steps: int, watch: Stopwatch) -> None:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            watch.step()

    class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return len(data)

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            return {"input_ids": data[index], "labels": data[index]}

    class Ours(nn.Module):  # our GPT in the form that transformers' Trainer wants
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"loss": logits_loss(self.model, input_ids)}

    data, model = shape.rows_of_data(steps), shape.model(kind)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=shape.rows, learning_rate=LR, adam_beta1=BETAS[0],
            adam_beta2=BETAS[1], weight_decay=DECAY, lr_scheduler_type="constant", max_grad_norm=CLIP, use_cpu=True,
            logging_steps=10, report_to=[], save_strategy="no", optim="adamw_torch_fused",
            train_sampling_strategy="sequential")
        trained = model if kind == "llama" else Ours(model)
        trainer = Trainer(trained, arguments, train_dataset=Rows(), callbacks=[Watch()])
        inner = trainer.training_step

        def training_step(*args: Any, **kwargs: Any) -> Tensor:
            loss = inner(*args, **kwargs)
            watch.losses.append(float(loss))
            return loss

        trainer.training_step = training_step
        trainer.create_optimizer()
        trainer.optimizer.step = watch.timed(trainer.optimizer.step)
        torch.nn.utils.clip_grad_norm_ = watch.timed(torch.nn.utils.clip_grad_norm_)
        trainer.train()


def run_lightning(shape: Shape, kind: str, steps: int, watch: Stopwatch) -> None:
    import lightning

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = shape.model(kind).train()

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            loss = logits_loss(self.model, batch)
            watch.losses.append(float(loss))
            self.log("loss", loss.detach(), prog_bar=True)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=LR, betas=BETAS, weight_decay=DECAY, fused=True)

        def on_train_batch_end(self, *args: Any) -> None:
            watch.step()

    data = shape.rows_of_data(steps)
    loader = torch.utils.data.DataLoader(data, batch_size=shape.rows)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as folder:
        lightning.Trainer(max_steps=steps, accelerator="cpu", logger=lightning.pytorch.loggers.CSVLogger(folder),
                          log_every_n_steps=10, enable_checkpointing=False, gradient_clip_val=CLIP,
                          default_root_dir=folder, enable_model_summary=False).fit(Module(), loader)


def run_bare(shape: Shape, kind: str, steps: int, watch: Stopwatch) -> None:
    """Forward and backward alone: what no loop can avoid. Any step's rest is overhead."""
    model, data = shape.model(kind).train(), shape.rows_of_data(steps)
    for ids in data.split(shape.rows):
        loss = logits_loss(model, ids)
        loss.backward()
        model.zero_grad()
        watch.losses.append(0.0)
        watch.step()


def run_gemm(shape: Shape, kind: str, steps: int, watch: Stopwatch) -> None:
    """Forward, gradient of the input, gradient of the weight of every matrix, back to back."""
    from fasttrain.optimizations import tune_cpu_memory

    tune_cpu_memory()
    n, d, f = shape.rows * shape.length, shape.width, shape.inner
    block = [(d, 3 * d), (d, d), (d, 2 * f), (f, d)] if kind == "gpt" else [(d, d)] * 4 + [(d, f)] * 2 + [(f, d)]
    products = [*block * shape.layers, (d, shape.vocab)]
    for _ in range(steps):
        for size_in, size_out in products:
            x, w, g = torch.ones(n, size_in), torch.ones(size_out, size_in), torch.ones(n, size_out)
            start = time.perf_counter()
            x @ w.t(), g @ w, g.t() @ x
            watch.update[-1] += time.perf_counter() - start
        watch.losses.append(0.0)
        watch.step()


RUNS = {"hand-written": run_hand, "transformers": run_transformers, "lightning": run_lightning,
        "fasttrain": run_fasttrain, "auto": run_auto, "gemm": run_gemm, "bare": run_bare}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contender", choices=RUNS, required=True)
    parser.add_argument("--model", choices=("gpt", "llama"), default="llama")
    parser.add_argument("--size", choices=("tiny", "real"), default="real")
    parser.add_argument("--vocab", type=int, default=50304)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--skip", type=int, default=2, help="steps at the start that are not counted")
    options = parser.parse_args()
    out, sys.stdout = sys.stdout, sys.stderr  # what the contenders print goes elsewhere
    watch = Stopwatch()
    RUNS[options.contender](Shape(options.size, options.vocab), options.model, options.steps, watch)
    ends, skip = watch.ends, options.skip
    steps = watch.update[skip:len(ends)] if options.contender == "gemm" else \
        [b - a for a, b in zip(ends[skip - 1:], ends[skip:])]
    peak = status_kib("VmHWM") / 1024
    json.dump({"ms": [1e3 * seconds for seconds in steps], "update_ms": [1e3 * s for s in watch.update[skip:len(ends)]],
               "peak_mib": peak, "losses": watch.losses, "decisions": watch.decisions}, out)


if __name__ == "__main__":
    main()
