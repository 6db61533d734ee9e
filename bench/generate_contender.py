"""One way of writing text, in a process of its own: threads, caches and memory of the others are not in its way.

    python bench/generate_contender.py KIND MODEL THREADS    KIND: transformers, fasttrain:DTYPE, llama.cpp, floor:BYTES

Says `{"ready": ...}` once loaded; then for each line of JSON ids and a count on stdin writes so many tokens, greedily,
and answers with the seconds and the ids. Imports nothing but what its kind needs, since llama.cpp may live in another
installation of Python.
"""

from __future__ import annotations

import json
import mmap
import sys
import time
from collections.abc import Callable
from typing import Any

Writer = Callable[[list[int], int], list[int]]
CONTEXT = 512


def load_model(path: str) -> Any:
    """A folder or .gguf file that transformers reads; `random` is SmolLM2-135M's shape with random weights."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if path != "random":
        folder, _, file = path.rpartition("/")
        if file.endswith(".gguf"):
            return AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def transformers_writer(path: str) -> Writer:
    import torch

    model = load_model(path)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    def write(ids: list[int], count: int) -> list[int]:
        with torch.inference_mode():
            prompt = torch.tensor([ids])
            output = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
            )
        return output[0, len(ids) :].tolist()

    return write


def fasttrain_writer(path: str, weight_dtype: str) -> Writer:
    from fasttrain.generation import generate

    model = load_model(path)

    def write(ids: list[int], count: int) -> list[int]:
        return generate(
            model,
            [ids],
            engine="native",
            max_new_tokens=count,
            temperature=0.0,
            eos_token_id=(),
            weight_dtype=weight_dtype,
        )[0]

    return write


def llama_writer(path: str, threads: int) -> Writer:
    import llama_cpp

    def quiet(*_: Any) -> None:
        """llama.cpp prints every tensor otherwise."""

    callback = llama_cpp.llama_log_callback(quiet)
    llama_cpp.llama_log_set(callback, None)
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
    options = llama_cpp.llama_context_default_params()
    options.n_ctx, options.n_threads, options.n_threads_batch = CONTEXT, threads, threads
    context = llama_cpp.llama_init_from_model(model, options)
    greedy = llama_cpp.llama_sampler_init_greedy()

    def write(ids: list[int], count: int) -> list[int]:
        assert callback is not None  # kept alive: C calls it
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        pending, written = ids, []
        for _ in range(count):
            tokens = (llama_cpp.llama_token * len(pending))(*pending)
            assert llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(tokens, len(pending))) == 0
            pending = [llama_cpp.llama_sampler_sample(greedy, context, -1)]
            written += pending
        return written

    return write


def floor_writer(size: int, threads: int) -> Writer:
    """Reads as many bytes as the weights have, once a token, as fast as both cores can."""
    import torch

    from fasttrain.backend import extension

    module: Any = extension()
    memory = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)  # as the packed weights are
    weights = torch.frombuffer(memory, dtype=torch.uint8).fill_(1)

    def write(ids: list[int], count: int) -> list[int]:
        for _ in range(count):
            module.checksums([(weights.data_ptr(), size)], threads)
        return []

    return write


def status_kib(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key))


def main() -> None:
    kind, path, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    name, _, detail = kind.partition(":")
    if name == "llama.cpp":
        import llama_cpp  # noqa: F401
    else:
        import torch
        import transformers  # noqa: F401

        torch.set_num_threads(threads)
    before = status_kib("VmRSS")
    if name == "transformers":
        write = transformers_writer(path)
    elif name == "fasttrain":
        write = fasttrain_writer(path, detail)
    elif name == "llama.cpp":
        write = llama_writer(path, threads)
    else:
        write = floor_writer(int(detail), threads)
    answers = sys.stdout
    sys.stdout = sys.stderr  # libraries may print
    print(json.dumps({"ready": kind}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        start = time.perf_counter()
        ids = write(request["ids"], request["count"])
        seconds = time.perf_counter() - start
        mib = (status_kib("VmHWM") - before) / 1024
        print(json.dumps({"seconds": seconds, "ids": ids, "mib": mib}), file=answers, flush=True)


if __name__ == "__main__":
    main()
