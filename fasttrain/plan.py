"""`fasttrain plan`: what one rank holds and sends for each way to spread a model, before any GPU is rented.

Parameters come from the real model built without memory, activations from running its micro-batch on fake tensors
(step_memory.py), optimizer states from AdamW's own layout, communication from the ring algorithms' formulas. What is
not run is a model and is called one: the parameters that fully_shard holds gathered (sharded_memory.py), the loss's
workspace, and the headroom for the driver, the communication library and fragmentation. Peaks of real steps of 2 and 4
ranks over gloo are met within a fiftieth (bench/bench_plan.py). fsdp-vocab is planned where the head is a matrix of its
own. Left out: pipelines, tensor and context parallelism, and time.

Legend: P bytes of the parameters, G of their gradients, k micro-batches of a step, n ranks, g ranks of a node, m nodes.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from .ops._adamw_moments import new_moments
from .ops._linear_chunks import rows_per_chunk
from .planned_model import PlannedModel, numel, planned_model
from .products import MIN_MULTIPLICATIONS, SLICE_BYTES, fastest
from .sharded_memory import Held, Moment, Unit, worst_moment
from .step_memory import StepMemory, trace_moments, trace_step
from .utils import format_bytes, format_count

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Setting:
    """What a plan depends on besides the model."""

    num_gpus: int
    memory_bytes: float
    batch_size: int
    """Sequences of a rank's micro-batch."""
    seq_len: int
    gpus_per_node: int = 8
    precision: str = "bfloat16"
    weights: str = "float32"
    optimizer_state_dtype: str = "float32"
    master: bool = False
    fused_loss: bool = True
    headroom: float = 0.1
    grad_accum_steps: int = 1
    device: str = "cuda"

    def __post_init__(self) -> None:
        for name in ("num_gpus", "batch_size", "seq_len", "gpus_per_node", "memory_bytes", "grad_accum_steps"):
            if getattr(self, name) <= 0:
                flag = {"num_gpus": "gpus", "batch_size": "batch", "memory_bytes": "memory"}.get(name, name)
                raise ValueError(f"{flag} is {getattr(self, name)}; it must be positive")
        if not 0.0 <= self.headroom < 1.0:
            raise ValueError(f"headroom is {self.headroom}; it must lie in [0, 1)")
        if self.master and self.weights != "bfloat16":
            raise ValueError(f"master is for bfloat16 weights; weights is {self.weights!r}, which needs none")

    @property
    def usable_bytes(self) -> float:
        return self.memory_bytes * (1 - self.headroom)


@dataclass(frozen=True)
class Row:
    """One strategy on one rank, in bytes."""

    strategy: str
    recompute: str
    weights: int
    gradients: int
    optimizer: int
    gathered: int
    """What fully_shard holds beside a rank's rows at the worst moment of a step: whole parameters and their buffers,
    and whole gradients: until they are summed, which with several micro-batches is in the last one's backward."""
    activations: int
    """What the same moment takes beside all others: activations, logits, casts, temporaries, the loss's workspace. A
    step's gradients come when activations go: those that a rank has in the end are not counted here once more."""
    sent: int
    """Bytes that a rank sends in a step, by ring algorithms."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.gathered + self.activations


def sharded_numel(shape: Sequence[int], num_ranks: int) -> int:
    """Elements of a parameter that `fully_shard` leaves on a rank: whole rows, padded to the largest rank's."""
    if not shape:
        return 1
    return math.ceil(shape[0] / num_ranks) * math.prod(shape[1:])


def optimizer_bytes(numel: int, whole: int, setting: Setting) -> int:
    """State of AdamW for `numel` elements of a parameter of `whole`, by its own layout."""
    part = torch.empty(numel, dtype=_DTYPES[setting.weights], device="meta")
    moments = new_moments(part, setting.optimizer_state_dtype, whole).values()
    return sum(moment.nbytes for moment in moments) + (2 * numel if setting.master else 0)


def _traced_by(recompute: str, setting: Setting) -> tuple[Any, ...]:
    """What a trace depends on."""
    return (recompute, setting.batch_size, setting.seq_len, setting.weights, setting.precision, setting.fused_loss)


class Plan:
    """A model and a setting, and what follows from them; traces are made once and kept."""

    def __init__(self, model: PlannedModel, setting: Setting) -> None:
        self.model, self.setting = model, setting
        self._traced: dict[tuple[Any, ...], StepMemory] = {}
        self._moments: dict[tuple[Any, ...], list[Moment]] = {}

    def rows(self, recompute: str = "none", setting: Setting | None = None) -> list[Row]:
        """One for each strategy that this many GPUs allow."""
        setting = setting or self.setting
        names = ["none"] if setting.num_gpus == 1 else ["none", "ddp", "fsdp"]
        if setting.num_gpus > 1 and self.model.head:
            names.append("fsdp-vocab")
        if setting.num_gpus > setting.gpus_per_node and setting.num_gpus % setting.gpus_per_node == 0:
            names.append("hsdp")
        return [self.row(name, recompute, setting) for name in names]

    def row(self, strategy: str, recompute: str, setting: Setting) -> Row:
        ranks = {"fsdp": setting.num_gpus, "fsdp-vocab": setting.num_gpus, "hsdp": setting.gpus_per_node}
        over = ranks.get(strategy, 1)
        local = [(sharded_numel(shape, over), math.prod(shape)) for shape in self.model.shapes]
        held = sum(numel for numel, _ in local) * _DTYPES[setting.weights].itemsize
        worst = (self.sharded(recompute, setting, over, strategy == "fsdp-vocab") if over > 1 else
                 Held(0, self.trace(recompute, setting, first=setting.grad_accum_steps == 1).peak))
        return Row(strategy, recompute, weights=held, gradients=held,
                   optimizer=sum(optimizer_bytes(numel, whole, setting) for numel, whole in local),
                   gathered=worst.gathered, activations=worst.others, sent=self.sent(strategy, setting))

    def sharded(self, recompute: str, setting: Setting, num_ranks: int, divided_head: bool) -> Held:
        """The worst moment of fsdp and its kin."""
        item, head_ranks = _DTYPES[setting.weights].itemsize, num_ranks if divided_head else 1
        # Of three micro-batches or more, those between the first and the last are alike.
        key = (*_traced_by(recompute, setting), min(setting.grad_accum_steps, 3), head_ranks)
        if key not in self._moments:
            self._moments[key] = trace_moments(**self._trace_arguments(recompute, setting, head_ranks),
                                               micro_batches=min(setting.grad_accum_steps, 3), head_ranks=head_ranks)
        outside = self.model.outside if divided_head else [*self.model.outside, *self.model.head]
        units = [Unit(item * sum(sharded_numel(shape, num_ranks) for shape in shapes),
                      item * math.prod(shapes[-1]) if shapes else 0) for shapes in (*self.model.blocks, outside)]
        return worst_moment(self._moments[key], units, num_ranks, setting.device == "cpu")

    def trace(self, recompute: str, setting: Setting, first: bool = False) -> StepMemory:
        """A micro-batch on fake tensors, all of the model on one rank; `first`: the one that makes the gradients."""
        key = (*_traced_by(recompute, setting), first)
        if key not in self._traced:
            self._traced[key] = trace_step(**self._trace_arguments(recompute, setting), first=first)
        return self._traced[key]

    def _trace_arguments(self, recompute: str, setting: Setting, head_ranks: int = 1) -> dict[str, Any]:
        weights = _DTYPES[setting.weights]
        return {"build": functools.partial(self.model.build, weights, setting.seq_len),
                "batch_size": setting.batch_size, "seq_len": setting.seq_len, "recompute": recompute,
                "autocast": _DTYPES[setting.precision] if setting.precision != setting.weights else None,
                "fused_loss": setting.fused_loss, "workspace": self.workspace(setting, head_ranks)}

    def workspace(self, setting: Setting, head_ranks: int = 1) -> int:
        """What the fused loss allocates inside itself, see ops/_linear_chunks.py: a chunk of logits and its product
        with the weight; for products of another type than the weights', copies of both factors and a chunk's part of
        the gradient; for 16-bit weights, a float32 sum of that. And oneDNN's slices, with the copy that it makes of
        one, and the result of the one before. Over several ranks, all of their tokens and a part of the classes, five
        numbers for each row of a chunk and one for each token, and after the last chunk what is received of the hidden
        states' gradient, with its sum."""
        if not setting.fused_loss and head_ranks == 1:
            return 0
        V, D, on_cpu = -(-self.model.vocab_size // head_ranks), self.model.hidden_size, setting.device == "cpu"
        tokens = setting.batch_size * setting.seq_len
        narrow = setting.precision == "bfloat16" if setting.precision != setting.weights or not on_cpu else False
        item = 2 if narrow else 4
        rows = rows_per_chunk(tokens * head_ranks, V, item, setting.device)
        copied = (V + rows) * D * item if narrow != (setting.weights == "bfloat16") else 0
        wide = 4 * V * D if setting.weights != "float32" else 0
        products = [rows * D * item, V * D * item if narrow and setting.weights == "float32" else 0]
        if head_ranks > 1:
            products.append(tokens * (head_ranks + 1 if on_cpu else 1) * D * _DTYPES[setting.weights].itemsize)
        if on_cpu and not narrow and rows * V * D >= MIN_MULTIPLICATIONS and fastest()[0] == "onednn":
            step = min(max(SLICE_BYTES // (4 * max(rows, D)), 128), V)
            products.append(4 * (2 * rows * step + 2 * step * D + rows * D))
        numbers = 8 * (5 * rows + tokens * head_ranks) if head_ranks > 1 else 0
        return rows * V * item + copied + wide + numbers + max(products)

    def sent(self, strategy: str, setting: Setting) -> int:
        """ddp: 2 (n-1)/n G. fsdp: (n-1)/n ((k + 1) P_blocks + P_rest + G). hybrid: that with g, and 2 (m-1)/m G/g.
        fsdp-vocab: fsdp's without the head, and k times, for n N tokens, (n-1)/n of their hidden states, of as many
        gradients and of int64 targets, and 2 (n-1)/n of two float64 each (and two more)."""
        item, n, g = _DTYPES[setting.weights].itemsize, setting.num_gpus, setting.gpus_per_node
        P, outside = self.model.num_parameters * item, numel(self.model.outside + self.model.head) * item

        def sharded(ranks: int, kept: int = 0) -> float:
            return (ranks - 1) / ranks * ((setting.grad_accum_steps + 1) * (P - outside) + outside + P - 2 * kept)

        if strategy == "ddp":
            return round(2 * (n - 1) / n * P)
        if strategy == "fsdp":
            return round(sharded(n))
        if strategy == "fsdp-vocab":
            tokens = n * setting.batch_size * setting.seq_len
            each = tokens * (2 * self.model.hidden_size * item + 8) + 2 * 8 * (2 * tokens + 2)
            return round(sharded(n, numel(self.model.head) * item) + setting.grad_accum_steps * (n - 1) / n * each)
        nodes = n // g
        return round(sharded(g) + 2 * (nodes - 1) / nodes * P / g) if strategy == "hsdp" else 0

    def cheapest(self, strategy: str, setting: Setting | None = None) -> Row:
        """The strategy with the least recomputation that fits, or, where none does, that needs the least memory."""
        setting = setting or self.setting
        rows = [self.row(strategy, recompute, setting) for recompute in self.model.recompute]
        return next((row for row in rows if row.total <= setting.usable_bytes), min(rows, key=lambda row: row.total))

    def fitting(self, setting: Setting | None = None) -> list[Row]:
        """Of each strategy the row of `cheapest`, where it fits."""
        setting = setting or self.setting
        found = [self.cheapest(row.strategy, setting) for row in self.rows(setting=setting)]
        return [row for row in found if row.total <= setting.usable_bytes]

    def advice(self) -> list[str]:
        """What to change so that something fits, each tried: alone, then together."""
        now = self.setting
        changes: list[tuple[str, dict[str, Any]]] = []
        if not now.fused_loss:
            changes.append(("the fused loss", {"fused_loss": True}))
        if now.weights == "float32" and now.precision == "bfloat16":
            changes.append(("--weights bfloat16 --master", {"weights": "bfloat16", "master": True}))
        if now.optimizer_state_dtype != "int8":
            changes.append(("--optimizer-state-dtype int8", {"optimizer_state_dtype": "int8"}))
        if now.batch_size > 1:
            half, steps = now.batch_size // 2, -(-now.batch_size * now.grad_accum_steps // (now.batch_size // 2))
            changes.append((f"--batch {half} --grad-accum-steps {steps}",
                            {"batch_size": half, "grad_accum_steps": steps}))
        tried = [self._tried(name, change) for name, change in changes]
        if changes and not any(fits for fits, _ in tried):
            together = {key: value for _, change in changes for key, value in change.items()}
            tried.append(self._tried("all of these, and --batch 1", {
                **together, "batch_size": 1, "grad_accum_steps": now.batch_size * now.grad_accum_steps}))
        for power in range(1, 13):
            num_gpus = 2 ** power
            if num_gpus > now.num_gpus and (found := self._tried(f"--gpus {num_gpus}", {"num_gpus": num_gpus}))[0]:
                tried.append(found)
                break
        return [line for _, line in tried]

    def _tried(self, name: str, change: dict[str, Any]) -> tuple[bool, str]:
        setting = dataclasses.replace(self.setting, **change)
        best = min((self.cheapest(row.strategy, setting) for row in self.rows(setting=setting)), key=lambda r: r.total)
        fits = best.total <= setting.usable_bytes
        how = best.strategy + ("" if best.recompute == "none" else f", activation_checkpointing={best.recompute}")
        return fits, f"{name}: {format_bytes(best.total)} ({how}), {'fits' if fits else 'still too much'}"


def parse_memory(text: str) -> float:
    """'80GB' -> 80e9, '80GiB' -> 80 * 2**30, a plain number -> bytes."""
    found = re.fullmatch(r"\s*([0-9.]+)\s*([kKMGT]?)(i?)B?\s*", text)
    if not found or found[1].count(".") > 1 or not found[1].strip("."):
        raise ValueError(f"memory is {text!r}; it must be a size such as 80GB, 79.6GiB or 24GB")
    power = "KMGT".find(found[2].upper()) + 1 if found[2] else 0
    return float(float(found[1]) * (1024 if found[3] else 1000) ** power)


def report(plan: Plan) -> dict[str, Any]:
    """All of it as JSON-ready data, sizes in bytes."""
    setting, model = plan.setting, plan.model
    traces = {recompute: plan.trace(recompute, setting)._asdict() for recompute in model.recompute}
    logits = setting.batch_size * setting.seq_len * model.vocab_size * 4
    rows = [plan.cheapest(row.strategy) for row in plan.rows()]
    return {
        "note": "a model, not a measurement: shapes and formulas, no GPU was used",
        "model": model.name, "num_parameters": model.num_parameters, "setting": dataclasses.asdict(setting),
        "usable_bytes": round(setting.usable_bytes), "workspace_bytes": plan.workspace(setting), "micro_batch": traces,
        "float32_logits_bytes": logits,
        "strategies": [{**dataclasses.asdict(row), "total": row.total, "fits": row.total <= setting.usable_bytes}
                       for row in rows],
        "advice": [] if plan.fitting() else plan.advice(),
    }


def print_plan(plan: Plan, found: dict[str, Any]) -> None:
    """The same for a reader."""
    from rich.console import Console
    from rich.table import Table

    console, setting, model = Console(), plan.setting, plan.model
    console.print(f"{model.name}: {format_count(model.num_parameters)} parameters, {setting.num_gpus} GPUs of "
                  f"{format_bytes(setting.memory_bytes)}, {setting.batch_size} x {setting.seq_len} tokens a GPU "
                  f"and micro-batch, {setting.grad_accum_steps} of them a step", highlight=False)
    console.print(f"A model, not a measurement. Usable: {format_bytes(setting.usable_bytes)} "
                  f"({setting.headroom:.0%} left for driver, communication and fragmentation).\n", highlight=False)
    rows = found["strategies"]
    table = Table("one rank", *(row["strategy"] for row in rows))
    for name in ("weights", "gradients", "optimizer", "gathered", "activations", "total", "sent"):
        table.add_row("sent in a step" if name == "sent" else name, *(format_bytes(row[name]) for row in rows))
    table.add_row("recomputation", *(row["recompute"] for row in rows))
    table.add_row("fits", *("yes" if row["fits"] else "no" for row in rows))
    console.print(table)
    table = Table("activation_checkpointing", "kept for the backward", "of it casts", "peak")
    for recompute, trace in found["micro_batch"].items():
        table.add_row(recompute, *(format_bytes(trace[name]) for name in ("held", "casts", "peak")))
    console.print(table)
    loss = "made, in float32" if not setting.fused_loss else "not made (fused loss); in float32 they would be"
    console.print(f"logits: {loss} {format_bytes(found['float32_logits_bytes'])}", highlight=False)
    if found["advice"]:
        console.print("\nNothing fits. What would help:", highlight=False)
        for line in found["advice"]:
            console.print(f"  {line}", highlight=False)


@dataclass(frozen=True, kw_only=True)
class PlanCommand:
    """Says what a model needs on each GPU for each way to spread it, and what fits: a model, no GPU is used."""

    model: str
    """gpt or llama with the sizes below; or a config.json or folder of Hugging Face, or a run's or checkpoint's."""
    batch: int
    """Sequences per GPU and micro-batch."""
    gpus: int = 1
    """How many."""
    memory: str = "80GB"
    """Of one GPU: 80GB is 80 * 10^9 bytes, 80GiB is 80 * 2^30."""
    seq_len: int = 2048
    """Tokens per sequence."""
    layers: int = 12
    """Decoder blocks (gpt, llama)."""
    dim: int = 768
    """Width of the residual stream (gpt, llama)."""
    heads: int = 12
    """Query heads (gpt, llama)."""
    kv_heads: int = 0
    """Key/value heads (gpt, llama; 0: as many as query heads)."""
    intermediate: int = 0
    """Width inside the MLP (gpt, llama; 0: 8/3 of dim, rounded up to a multiple of 64)."""
    vocab: int = 50304
    """Token ids (gpt, llama)."""
    tie_embeddings: bool = True
    """One matrix for token embedding and output head (gpt); off: fsdp-vocab, which divides the head, is planned too."""
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the products: autocast where it differs from the weights."""
    weights: Literal["float32", "bfloat16"] = "float32"
    """How parameters and gradients are kept."""
    master: bool = False
    """Two more bytes for each bfloat16 weight: AdamW(master="remainder")."""
    optimizer_state_dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    """As in TrainConfig."""
    fused_loss: bool = True
    """The loss from hidden states; off: all the logits."""
    grad_accum_steps: int = 1
    """Micro-batches of a step, on each GPU."""
    gpus_per_node: int = 8
    """Ranks that hsdp divides a copy over."""
    headroom: float = 0.1
    """Share of the memory left for driver, communication library and fragmentation."""
    json: bool = False
    """Print JSON, sizes in bytes."""

    def run(self) -> int:
        sizes = {"layers": self.layers, "dim": self.dim, "heads": self.heads, "kv_heads": self.kv_heads,
                 "intermediate": self.intermediate, "vocab": self.vocab, "tie_embeddings": self.tie_embeddings}
        setting = Setting(self.gpus, parse_memory(self.memory), self.batch, self.seq_len, self.gpus_per_node,
                          self.precision, self.weights, self.optimizer_state_dtype, self.master, self.fused_loss,
                          self.headroom, self.grad_accum_steps)
        plan = Plan(planned_model(self.model, sizes, self.seq_len), setting)
        found = report(plan)
        if self.json:
            print(json.dumps(found, indent=1))
        else:
            print_plan(plan, found)
        return 0
