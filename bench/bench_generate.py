"""Writing text on the CPU: fasttrain, transformers and llama.cpp, each in a process of its own, taking turns.

    python -m bench.bench_generate [--model FOLDER_OR_GGUF] [--llama-python PYTHON] [--parts speed,batch,...]

The model is SmolLM2-135M's shape with random weights unless one is given; llama.cpp takes part where llama-cpp-python
is importable by this interpreter or by the given one (or by FASTTRAIN_LLAMA_PYTHON). Before anything is timed, the
greedy texts are compared. The floor reads as many bytes as the weights have, once a token. `greedy` and `quality` need
a real model and read the standard library's source: 20 texts beside transformers', and perplexities.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.common import RESULTS, ROWS, Row, environment, markdown, percentiles, results_title
from bench.generate_contender import load_model
from bench.generate_strategies import penalties, speculation
from fasttrain import ops
from fasttrain.backend import CPP_PROBLEM, extension
from fasttrain.native_decoding import NativeDecoder

CONTENDER = Path(__file__).with_name("generate_contender.py")
PARTS = ("speed", "batch", "prefill", "context", "sampler", "speculation", "penalties", "check", "greedy", "quality")
PROMPT, COUNT, ROUNDS = 16, 128, 5
# Of a width llama.cpp's counterpart and bytes a weight: of the blocks' matrices, and of the embedding and head.
WIDTHS = {
    "float32": ("F32", 4.0, 4.0),
    "bfloat16": ("BF16", 2.0, 2.0),
    "int8": ("Q8_0", 1 + 1 / 32, 1 + 1 / 32),
    "int4": ("Q4_1", 5 / 8, 1 + 1 / 32),
}
GREEDY = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


class Contender:
    """A process that writes when it is asked to."""

    def __init__(self, kind: str, model: str, python: str = sys.executable) -> None:
        command = [python, str(CONTENDER), kind, model, str(torch.get_num_threads())]
        root = str(CONTENDER.parent.parent)
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root,
            env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        )  # fmt: skip
        self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args} ended with {self._process.wait()}")
        return json.loads(line)

    def write(self, ids: list[int], count: int) -> dict[str, Any]:
        assert self._process.stdin is not None
        print(json.dumps({"ids": ids, "count": count}), file=self._process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def llama_python(given: str | None) -> str | None:
    """An interpreter that has llama-cpp-python, or None."""
    if importlib.util.find_spec("gguf") is None:
        return None  # its model files are written with gguf
    if given or os.environ.get("FASTTRAIN_LLAMA_PYTHON"):
        return given or os.environ["FASTTRAIN_LLAMA_PYTHON"]
    return sys.executable if importlib.util.find_spec("llama_cpp") else None


def write_gguf(model: Any, path: str, kind: str) -> None:
    """The model as llama.cpp reads it, without a tokenizer; matrices in F32, BF16, Q8_0 or Q4_1 (then the embedding in
    Q8_0, as its own converter does)."""
    import gguf

    config, heads = (
        model.config,
        {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads},
    )
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip

    def add(name: str, weight: Tensor) -> None:
        data = weight.detach().float().numpy()
        if weight.dim() > 1 and kind != "F32":
            dtype = gguf.GGMLQuantizationType["Q8_0" if kind == "Q4_1" and name == "token_embd" else kind]
            data = gguf.quants.quantize(data, dtype)
            writer.add_tensor(name + ".weight", data, raw_dtype=dtype)
        else:
            writer.add_tensor(name + ".weight", data)

    add("token_embd", model.model.embed_tokens.weight)
    add("output_norm", model.model.norm.weight)
    for i, layer in enumerate(model.model.layers):
        for ours, theirs in names.items():
            weight = layer.get_submodule(ours).weight
            count = heads.get(ours.rpartition(".")[2])
            if count is not None:  # llama.cpp turns neighbouring pairs
                weight = weight.view(count, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
            add(f"blk.{i}.{theirs}", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@contextmanager
def contenders(path: str, python: str | None) -> Iterator[dict[tuple[str, str], Contender]]:
    """(width, name) -> process; all loaded, one at a time asked to write."""
    model = load_model(path)
    outer = model.model.embed_tokens.weight.numel()
    inner = sum(p.numel() for p in model.parameters()) - outer
    started: dict[tuple[str, str], Contender] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for width, (kind, each, each_outer) in WIDTHS.items():
                size = int(inner * each + outer * each_outer)
                started[width, "floor: read the weights"] = Contender(f"floor:{size}", path)
                if width == "float32":
                    started[width, "transformers"] = Contender("transformers", path)
                if python is not None:
                    file = f"{folder}/{kind}.gguf"
                    write_gguf(model, file, kind)
                    started[width, f"llama.cpp {kind.lower()}"] = Contender("llama.cpp", file, python)
                started[width, "fasttrain"] = Contender(f"fasttrain:{width}", path)
            yield started
        finally:
            for contender in started.values():
                contender.close()


def prompt_ids(length: int, vocabulary: int, seed: int = 0) -> list[int]:
    return torch.randint(3, vocabulary, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def speed(path: str, python: str | None, count: int = COUNT, rounds: int = ROUNDS) -> tuple[list[Row], list[str]]:
    """Milliseconds a token of a whole call: a prompt of 16 tokens, then `count` new ones, greedily."""
    rows, notes = [], []
    with contenders(path, python) as processes:
        ids = prompt_ids(PROMPT, 40000)
        texts = {key: process.write(ids, count)["ids"] for key, process in processes.items()}
        ours = texts["float32", "fasttrain"]
        assert ours == texts["float32", "transformers"], "greedy text differs from transformers'"
        for (_, name), text in texts.items():
            if name.startswith("llama.cpp"):
                same = next((i for i, (a, b) in enumerate(zip(ours, text)) if a != b), count)
                notes.append(f"{name}: the first {same} of {count} greedy tokens are those of fasttrain in float32.")
        times: dict[tuple[str, str], list[float]] = {key: [] for key in processes}
        memory: dict[tuple[str, str], float] = {}
        for _ in range(rounds):
            for key, process in processes.items():
                answer = process.write(ids, count)
                times[key].append(answer["seconds"] * 1e3 / count)
                memory[key] = answer["mib"]
    size = "SmolLM2-135M shape" if path == "random" else Path(path).name
    for (width, name), values in times.items():
        p20, p50, p80 = percentiles(values)
        ours_p50 = statistics.median(times[width, "fasttrain"])
        rows.append(
            Row(
                f"generate, batch 1, {width}, ms a token",
                size,
                name,
                p20,
                p50,
                p80,
                p50 / ours_p50,
                memory[width, name],
            )
        )
    for width in WIDTHS:
        p50 = {row.contender: row.p50_ms for row in rows if f" {width}," in row.benchmark}
        text = ", ".join(f"{name} {1e3 / ms:.0f}" for name, ms in p50.items())
        share = p50["floor: read the weights"] / p50["fasttrain"]
        notes.append(f"{width}: tokens a second: {text}; {share:.0%} of the bandwidth floor.")
    return rows, notes


def seconds_of(call: Callable[[], Any], repeats: int) -> float:
    """Median."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def decoding_seconds(decoder: NativeDecoder, rows: int, steps: int, sampling: dict[str, Any], vocabulary: int) -> float:
    """A token of each row, in the loop in C++."""
    start = time.perf_counter()
    decoder.run(steps, list(range(rows)), vocabulary, [], None, **sampling)
    return (time.perf_counter() - start) / steps


def batch(model: Any) -> list[str]:
    vocabulary, prompt = model.config.vocab_size, prompt_ids(PROMPT, 40000)
    lines = ["| rows | " + " | ".join(WIDTHS) + " |", "|---|" + "---|" * len(WIDTHS)]
    times: dict[tuple[str, int], list[float]] = {}
    sizes = (1, 2, 4, 8, 16, 32)
    decoders = {width: NativeDecoder(load_copy(model), width) for width in WIDTHS}  # type: ignore[arg-type]
    for _ in range(3):
        for width, decoder in decoders.items():
            for rows in sizes:
                decoder.start([prompt] * rows, 128)
                decoding_seconds(decoder, rows, 2, GREEDY, vocabulary)
                times.setdefault((width, rows), []).append(decoding_seconds(decoder, rows, 24, GREEDY, vocabulary))
    for rows in sizes:
        cells = []
        for width in WIDTHS:
            rate, alone = rows / statistics.median(times[width, rows]), 1 / statistics.median(times[width, 1])
            cells.append(f"{rate:.0f} ({rate / alone:.1f}x)")
        lines.append(f"| {rows} | " + " | ".join(cells) + " |")
    return ["Tokens a second of a batch, and over those of one row:", "", *lines]


def load_copy(model: Any) -> Any:
    """The same model under another identity: packed weights are kept for one width a model."""
    with torch.no_grad():
        return copy.copy(model)


def prefill(model: Any) -> list[str]:
    """Reading a prompt of 512 tokens, beside PyTorch's products of the same shapes (no head, no attention)."""
    T, decoder, config = 512, NativeDecoder(model), model.config
    prompt = prompt_ids(T, 40000)
    layers = [[layer.get_submodule(name).weight for name in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
        "mlp.down_proj")] for layer in model.model.layers]  # fmt: skip
    fused = [[torch.cat(w[:3]), w[3], torch.cat(w[4:6]), w[6]] for w in layers]
    inputs = {width: torch.randn(T, width) for width in {w.shape[1] for w in fused[0]}}
    outputs = {w.shape[0]: torch.empty(T, w.shape[0]) for w in fused[0]}

    def products() -> None:
        for weights in fused:
            for w in weights:
                torch.mm(inputs[w.shape[1]], w.T, out=outputs[w.shape[0]])

    with torch.inference_mode():
        rounds = [(seconds_of(products, 1), seconds_of(lambda: decoder.start([prompt], T), 1)) for _ in range(7)][1:]
    gemm, ours = (statistics.median(column) for column in zip(*rounds))
    flops = 2 * T * sum(w.numel() for weights in fused for w in weights)
    return [
        f"A prompt of {T} tokens: {ours * 1e3:.0f} ms, {T / ours:.0f} tokens a second, everything included. PyTorch's "
        f"matrix products of the same shapes alone: {gemm * 1e3:.0f} ms ({flops / gemm / 1e9:.0f} GFLOP/s): "
        f"{ours / gemm:.2f} times their time (attention, norms and a head of {config.vocab_size} outputs included)."
    ]


def context(model: Any, png: Path | None) -> list[str]:
    """Milliseconds a token with so many positions before it."""
    lengths, vocabulary = (0, 128, 256, 512, 1024, 2048, 3072, 4096), model.config.vocab_size
    curves: dict[str, list[float]] = {}
    for width in WIDTHS:
        decoder = NativeDecoder(load_copy(model), width)  # type: ignore[arg-type]
        decoder.start([prompt_ids(8, 40000)], 4200)
        at, curves[width] = 8, []
        for length in lengths:
            if length > at:
                decoder.append([prompt_ids(length - at, 40000)])
                at = length
            decoder.run(1, [0], vocabulary, [], None, **GREEDY)
            curves[width].append(
                statistics.median(decoding_seconds(decoder, 1, 4, GREEDY, vocabulary) for _ in range(5)) * 1e3
            )
            at += 20
    if png is not None:
        plot(curves, lengths, png)
    lines = ["| positions | " + " | ".join(f"{width} ms" for width in WIDTHS) + " |", "|---|" + "---|" * len(WIDTHS)]
    for i, length in enumerate(lengths):
        lines.append(f"| {max(length, 8)} | " + " | ".join(f"{curves[width][i]:.2f}" for width in WIDTHS) + " |")
    return ["Milliseconds a token against the positions before it (keys and values: float32 with float32 weights, else",
            f"float16){f'; plotted in {png.name}' if png else ''}:", "", *lines]  # fmt: skip


def plot(curves: dict[str, list[float]], lengths: tuple[int, ...], png: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.6))
    for width, values in curves.items():
        axes.plot(lengths, values, marker="o", markersize=3, label=width)
    axes.set(xlabel="positions before the token", ylabel="ms a token", ylim=(0, None))
    axes.legend(title="weights")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(png, dpi=110)


def sampler(model: Any) -> list[str]:
    """The draw's share of a token, filters on."""
    vocabulary, sampling = model.config.vocab_size, {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.0}
    lines = []
    for width in ("float32", "int8", "int4"):
        decoder = NativeDecoder(load_copy(model), width)  # type: ignore[arg-type]
        logits = decoder.start([prompt_ids(PROMPT, 40000)], 256)
        for options in (sampling, {**sampling, "top_k": 0}):
            token = statistics.median(decoding_seconds(decoder, 1, 8, options, vocabulary) for _ in range(5))
            draw = seconds_of(partial(ops.sample, logits, seed=1, **options), 200)
            lines.append(
                f"| {width} | {options['top_k']} | {token * 1e3:.2f} | {draw * 1e6:.0f} | {draw / token:.1%} |"
            )
    head = ["| weights | top-k (and top-p 0.9) | ms a token | draw, us | share |", "|---|---|---|---|---|"]
    return [f"The sampler's share of a token, V={vocabulary}:", "", *head, *lines]


def tokenizer_of(path: str) -> Any:
    """The model's, or None for random weights."""
    from transformers import AutoTokenizer

    folder, _, file = path.rpartition("/")
    if path == "random":
        return None
    if file.endswith(".gguf"):
        return AutoTokenizer.from_pretrained(folder, gguf_file=file)
    return AutoTokenizer.from_pretrained(path)


def ids_of_the_standard_library(path: str) -> list[int]:
    stdlib = Path(os.__file__).parent
    text = "".join(
        (stdlib / name).read_text()
        for name in ("argparse.py", "statistics.py", "textwrap.py", "shutil.py", "json/decoder.py")
    )
    return tokenizer_of(path)(text)["input_ids"]


def quality(path: str, model: Any) -> list[str]:
    """Perplexity by width."""
    ids = ids_of_the_standard_library(path)
    lines = perplexities(model, ids)
    if path.lower().endswith(".gguf"):
        lines += [
            "",
            "A GGUF file's weights may have been in 4 bits before, which 4 bits then hold. The same function with its",
            "channels scaled by 2^-1/4 to 2^1/4 and back, so that the weights lie on no grid:",
            "",
        ]
        lines += perplexities(off_the_grid(model), ids)
    return lines


def perplexities(model: Any, ids: list[int]) -> list[str]:
    lines, base = [], None
    for width in WIDTHS:
        loss = statistics.fmean(negative_log_likelihoods(NativeDecoder(model, width), ids, 1024, 16))  # type: ignore[arg-type]
        base = base or loss
        lines.append(
            f"- {width}: perplexity {math.exp(loss):.4f} over 16 windows of 1024 tokens of the standard library's "
            f"source ({math.expm1(loss - base):+.3%} of float32's)"
        )
    return lines


@torch.no_grad()
def off_the_grid(model: Any) -> Any:
    """The same function with other weights: what feeds a matrix is scaled by channels and the matrix back."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    config = model.config
    group = config.num_attention_heads // config.num_key_value_heads

    def factors(size: int) -> Tensor:
        return torch.exp2(torch.rand(size, generator=generator) * 0.5 - 0.25)

    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, matrices in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            factor = factors(config.hidden_size)
            norm.weight.mul_(factor)
            for matrix in matrices:
                matrix.weight.div_(factor)
        factor = factors(mlp.up_proj.weight.shape[0])
        mlp.up_proj.weight.mul_(factor[:, None])
        mlp.down_proj.weight.div_(factor)
        factor = factors(attention.v_proj.weight.shape[0])
        attention.v_proj.weight.mul_(factor[:, None])
        heads = factor.view(config.num_key_value_heads, 1, -1)
        attention.o_proj.weight.div_(heads.expand(-1, group, -1).flatten())
    return model


def check(model: Any) -> list[str]:
    """What it costs, before each text, to see that the packed weights are still the model's."""
    tensors = list(model.parameters())
    memory, module = [(t.data_ptr(), t.nbytes) for t in tensors], extension()
    threads = torch.get_num_threads()
    whole = seconds_of(lambda: module.checksums(memory, threads), 9)  # type: ignore[union-attr]
    NativeDecoder(model, "int8")
    call = seconds_of(lambda: NativeDecoder(model, "int8"), 25)
    token, decoder = [], NativeDecoder(model, "int8")
    for _ in range(5):
        decoder.start([prompt_ids(PROMPT, 40000)], 256)
        token.append(decoding_seconds(decoder, 1, 32, GREEDY, model.config.vocab_size))
    share = call / (call + COUNT * statistics.median(token))
    return [
        f"Before each text, {call * 1e3:.2f} ms: versions of {len(tensors)} tensors and sums of an eighth of their "
        f"{sum(t.nbytes for t in tensors) / 1e6:.0f} MB (all of them: {whole * 1e3:.2f} ms); {share:.2%} of a text of "
        f"{COUNT} tokens with int8 weights."
    ]


def greedy_texts(model: Any, ids: list[int], prompts: int = 20, count: int = 128) -> str:
    """Ours against transformers' generate; where they part, how close the two likeliest tokens were."""
    parted = []
    for i in range(prompts):
        prompt = ids[i * 700 : i * 700 + 24 + i]
        with torch.inference_mode():
            tensor = torch.tensor([prompt])
            theirs = model.generate(
                tensor, attention_mask=torch.ones_like(tensor), max_new_tokens=count, min_new_tokens=count,
                do_sample=False, eos_token_id=None, pad_token_id=0,
            )[0, len(prompt) :].tolist()  # fmt: skip
        decoder = NativeDecoder(model)
        first = decoder.start([prompt], len(prompt) + count)[0]
        ours = [round[0] for round in decoder.run(count, [0], model.config.vocab_size, [], None, **GREEDY)]
        if ours != theirs:
            at = next(k for k in range(count) if ours[k] != theirs[k])
            logits = first if at == 0 else NativeDecoder(model).start([prompt + ours[:at]], len(prompt) + count)[0]
            gap = float(logits[ours[at]] - logits[theirs[at]])
            parted.append(f"prompt {i} at token {at} (logits {gap:.1e} apart)")
    same = prompts - len(parted)
    return f"Greedy text in float32: {same} of {prompts} prompts x {count} tokens as transformers'" + (
        f"; parted: {', '.join(parted)}." if parted else "."
    )


def negative_log_likelihoods(decoder: NativeDecoder, ids: list[int], window: int, windows: int) -> Iterator[float]:
    for i in range(windows):
        part = ids[i * window : (i + 1) * window]
        decoder.start([part[:1]], window)
        logits = decoder.append([part[1:]], every=True)  # (window - 1, V): after each token but the first
        yield float(torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(part[2:])))


@pytest.mark.skipif(bool(CPP_PROBLEM), reason=CPP_PROBLEM or "has the extension")
def test_generate() -> None:
    rows, notes = speed("random", llama_python(None), count=64, rounds=3)
    ROWS.extend(rows)
    print("\n".join(notes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random", help="a folder or .gguf file; default: random weights")
    parser.add_argument("--llama-python", help="an interpreter with llama-cpp-python")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--out", help="name of the results file in bench/results/, without suffix")
    options = parser.parse_args()
    parts = options.parts.split(",")
    name = options.out or f"generate-{results_title()}"
    RESULTS.mkdir(exist_ok=True)
    model = load_model(options.model) if set(parts) - {"speed"} else None
    sections: dict[str, Callable[[], list[str]]] = {
        "batch": lambda: batch(model),
        "prefill": lambda: prefill(model),
        "context": lambda: context(model, RESULTS / f"{name}-context.png"),
        "sampler": lambda: sampler(model),
        "speculation": lambda: speculation(model, tokenizer_of(options.model)),
        "penalties": lambda: penalties(model, tokenizer_of(options.model)),
        "check": lambda: check(model),
        "greedy": lambda: [greedy_texts(model, ids_of_the_standard_library(options.model))],
        "quality": lambda: quality(options.model, model),
    }
    for part in parts:
        if part in ("greedy", "quality") and options.model == "random":
            print(f"## {part}\nNeeds --model.\n", flush=True)
            continue
        if part == "speed":
            rows, notes = speed(options.model, llama_python(options.llama_python))
            lines = [*markdown(rows).splitlines(), "", *(f"- {note}" for note in notes)]
        else:
            lines = sections[part]()
        text = "\n".join(lines)
        print(f"## {part}\n{text}\n", flush=True)
        write_section(name, part, text, options.model)


def write_section(name: str, part: str, text: str, model: str) -> None:
    """Puts one part's text in the results file, which keeps the others: a part a run fits a busy day."""
    path = RESULTS / f"{name}.md"
    facts = "; ".join(f"{key}: {value}" for key, value in environment().items())
    named = "random weights" if model == "random" else Path(model).name
    body = f"## {part}\n\n{facts}; model: {named}\n\n{text.strip()}\n"
    old = (
        path.read_text()
        if path.exists()
        else "# generate\n\nMade by `python -m bench.bench_generate`, a part at a time.\n"
    )
    head, *chunks = old.split("\n## ")
    kept = {chunk.split("\n", 1)[0]: "## " + chunk.rstrip() + "\n" for chunk in chunks}
    kept[part] = body
    path.write_text("\n".join([head.rstrip() + "\n", *(kept[key] for key in PARTS if key in kept)]))


if __name__ == "__main__":
    main()
