"""Parts of bench_generate.py: what speculation brings, and what penalties cost, through `generate` itself."""

from __future__ import annotations

import copy
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from fasttrain.generation import generate

CODE = ("argparse.py", "textwrap.py", "shutil.py")
WIDTH = "float32"


def code_prompts(tokenizer: Any, count: int = 3, length: int = 400) -> list[list[int]]:
    """The beginnings of files of the standard library, or random ids that repeat where there is no tokenizer."""
    if tokenizer is None:
        piece = torch.randint(3, 40000, (length // 2,), generator=torch.Generator().manual_seed(0)).tolist()
        return [piece[i:] + piece for i in range(count)]
    stdlib = Path(os.__file__).parent
    return [tokenizer((stdlib / name).read_text())["input_ids"][:length] for name in CODE[:count]]


def first_layers(model: Any, count: int) -> Any:
    """The model with its first blocks only, in bfloat16: the draft model that one has without training one."""
    draft = copy.deepcopy(model)
    draft.model.layers = draft.model.layers[:count]
    draft.config.num_hidden_layers = count
    return draft.bfloat16().eval()


def speculation(model: Any, tokenizer: Any, new: int = 128, rounds: int = 3) -> list[str]:
    prompts = code_prompts(tokenizer)
    ways: dict[str, dict[str, Any]] = {
        "plain": {},
        "prompt lookup, 8 guesses": {"speculation": "lookup"},
        "prompt lookup, 16 guesses": {"speculation": "lookup", "num_draft_tokens": 16},
        "draft: its first 10 of 30 blocks, 4 guesses": {"draft_model": first_layers(model, 10), "num_draft_tokens": 4},
        "draft: the model itself in bfloat16, 4 guesses": {
            "draft_model": copy.deepcopy(model).bfloat16(), "num_draft_tokens": 4,
        },
    }  # fmt: skip
    lines = [
        f"Greedy, {new} new tokens after {len(prompts[0])} of each of {len(prompts)} files of the standard library, "
        f"one at a time, {WIDTH} weights; the texts are equal. Tokens a second of whole calls, prompt included:", "",
        "| way | accepted of the guesses | calls of the model | tokens a second | of plain |", "|---|---|---|---|---|",
    ]  # fmt: skip
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    found: dict[str, list[Any]] = {}
    for _ in range(rounds + 1):
        for way, options in ways.items():
            start = time.perf_counter()
            found[way] = [
                generate(model, [prompt], engine="native", weight_dtype=WIDTH, temperature=0.0, max_new_tokens=new,
                         eos_token_id=(), details=True, **options)[0]
                for prompt in prompts
            ]  # fmt: skip
            seconds[way].append(time.perf_counter() - start)
    plain = statistics.median(seconds["plain"][1:])
    for way, rows in found.items():
        assert [row.ids for row in rows] == [row.ids for row in found["plain"]], f"{way} changed the text"
        drafted, accepted = sum(row.drafted for row in rows), sum(row.accepted for row in rows)
        calls = sum(row.model_calls for row in rows) or new * len(rows)
        took = statistics.median(seconds[way][1:])
        rate = f"{accepted} of {drafted} ({accepted / drafted:.0%})" if drafted else "-"
        lines.append(f"| {way} | {rate} | {calls} | {new * len(rows) / took:.0f} | {plain / took:.2f}x |")
    return lines


def penalties(model: Any, tokenizer: Any, new: int = 96, rounds: int = 5) -> list[str]:
    prompt = code_prompts(tokenizer, 1, 512)[0]
    ways: dict[str, dict[str, Any]] = {
        "none (the loop in C++)": {},
        "none (the loop in Python)": {"processors": (lambda ids, logits: logits,)},
        "repetition_penalty=1.1": {"repetition_penalty": 1.1},
        "frequency_penalty=0.2, presence_penalty=0.1": {"frequency_penalty": 0.2, "presence_penalty": 0.1},
        "DRY": {"dry_multiplier": 0.8, "dry_breakers": ()},
        "no_repeat_ngram=4": {"no_repeat_ngram": 4},
        "all of them": {"repetition_penalty": 1.1, "frequency_penalty": 0.2, "presence_penalty": 0.1,
                        "dry_multiplier": 0.8, "dry_breakers": (), "no_repeat_ngram": 4},
    }  # fmt: skip
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds + 1):
        for way, options in ways.items():
            took = []
            for count in (1, 1 + new):  # the prompt's share goes away
                start = time.perf_counter()
                generate(model, [prompt], engine="native", weight_dtype="int8", temperature=0.8, top_k=50, top_p=0.9,
                         max_new_tokens=count, eos_token_id=(), **options)  # fmt: skip
                took.append(time.perf_counter() - start)
            seconds[way].append((took[1] - took[0]) / new)
    lines = [
        f"Milliseconds a token, int8 weights, top-k 50 and top-p 0.9, after a prompt of {len(prompt)} tokens:", "",
        "| penalties | ms a token | more than none, us |", "|---|---|---|",
    ]  # fmt: skip
    base = statistics.median(next(iter(seconds.values()))[1:])
    for way, values in seconds.items():
        value = statistics.median(values[1:])
        lines.append(f"| {way} | {value * 1e3:.2f} | {(value - base) * 1e6:.0f} |")
    return lines
