"""One process against two, each with one thread: tokens a second, and bytes on the wire against the least there are.

    python -m bench.bench_parallel              over the loopback interface
    python -m bench.bench_parallel 1000         over a link of 1000 Mbit/s (root: in a network namespace, by tc)

Each rewrites its own section of bench/results/parallel.md. The same model and the same global batch for all; the losses
are compared first. Bytes are those that the loopback interface carried between two steps (other programs' traffic
included: run it on a quiet machine), so protocol and all.
The least: a ring sends 2 (N - 1) / N of the gradients from each rank for their sum (ddp); for fsdp (N - 1) / N of the
parameters for each gather, in the forward and, but for what lies outside of the blocks, again in the backward, and
(N - 1) / N of the gradients for their scattered sum.
Two rows are what fasttrain does not do: ddp whose gradients are summed after the backward, and fsdp with gloo's own
reduce-scatter.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import platform
import re
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results" / "parallel.md"
MODEL = {"vocab_size": 4096, "num_layers": 6, "num_heads": 4, "hidden_size": 256, "max_seq_len": 128}
WARM, STEPS, BATCH = 3, 12, 16
AFTER, GLOO = "ddp-after", "fsdp-gloo"
NAMES = {"none": "none", AFTER: "ddp, summed after the backward", "ddp": "ddp", GLOO: "fsdp, gloo's reduce-scatter",
         "fsdp": "fsdp"}


def loopback_bytes() -> int:
    text = Path("/proc/net/dev").read_text()
    found = re.search(r"^\s*lo:\s*(\d+)", text, re.MULTILINE)
    return int(found[1]) if found else 0


class Meter:
    """Times each step, and reads the wire and the team's own counts after the warm-up and at the end."""

    observer = False

    def __init__(self, warm: int, steps: int) -> None:
        self._at = warm, steps
        self.ends: list[float] = []
        self.counts: list[tuple[int, int, float]] = []

    def on_step(self, state: Any) -> None:
        self.ends.append(time.perf_counter())
        if state.step in self._at:
            self.counts.append((loopback_bytes(), state.team.bytes, state.team.seconds))


def work(contender: str) -> None:
    """One rank."""
    from fasttrain import TrainConfig, Trainer, parallel, sharding
    from fasttrain.data import TokenDataset, TokenLoader
    from fasttrain.models.gpt import GPT, GPTConfig
    from fasttrain.utils import peak_rss_bytes

    if contender == AFTER:
        parallel.Replicas = functools.partial(parallel.Replicas, overlap=False)  # type: ignore[misc, assignment]
    if contender == GLOO:
        sharding.scatter_sum = lambda output, whole, group: sharding.SCATTER(output, whole, group=group)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = GPT(GPTConfig(**MODEL))
    blocks, every = (sum(p.numel() * 4 for p in part.parameters()) for part in (model.blocks, model))
    length = MODEL["max_seq_len"]
    tokens = torch.randint(0, MODEL["vocab_size"], (BATCH * STEPS * length + 1,))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    meter = Meter(WARM, STEPS)
    trainer = Trainer(model, TokenLoader(TokenDataset(tokens, length), BATCH // world), callbacks=[meter],
                      config=TrainConfig(max_steps=STEPS, parallel=contender.partition("-")[0],  # type: ignore[arg-type]
                                         precision="float32", preflight=False, log_every_steps=STEPS))
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.progress.stream = io.StringIO()
        result = trainer.train()
    if trainer.team.leads:
        (wire, counted, told), (wire_end, counted_end, told_end) = meter.counts
        seconds = meter.ends[-1] - meter.ends[WARM - 1]
        each = [b - a for a, b in zip(meter.ends[WARM - 1:], meter.ends[WARM:])]
        print(json.dumps({
            "loss": result.train_loss, "step_ms": 1e3 * statistics.median(each), "blocks": blocks, "every": every,
            "tokens_per_second": BATCH * length / statistics.median(each), "share": (told_end - told) / seconds,
            "wire": (wire_end - wire) / (STEPS - WARM), "counted": (counted_end - counted) / (STEPS - WARM),
            "peak_mib": peak_rss_bytes() / 2**20}))


def start_ranks(module: str, arguments: list[str], world_size: int) -> list[str]:
    """What each rank of `python -m module arguments` prints."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
              "WORLD_SIZE": str(world_size)}
    if world_size == 1:
        shared.pop("WORLD_SIZE")
    ranks = [subprocess.Popen([sys.executable, "-m", module, *arguments], stdout=subprocess.PIPE, text=True,
                              env=shared if world_size == 1 else {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
             for rank in range(world_size)]
    texts = [rank.communicate()[0] for rank in ranks]
    assert not any(rank.returncode for rank in ranks), texts
    return texts


def run(parallel: str, world_size: int) -> dict[str, Any]:
    printed = start_ranks("bench.bench_parallel", [parallel], world_size)[0]
    outcome: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return outcome


def least(contender: str, ranks: int, row: dict[str, Any]) -> float:
    """Bytes that all ranks together have to send in a step."""
    part = (ranks - 1) / ranks * ranks
    if contender in (AFTER, "ddp"):
        return 2 * part * row["every"]
    return part * (row["every"] + row["blocks"] + row["every"]) if contender in (GLOO, "fsdp") else 0.0


def write_section(title: str, lines: list[str]) -> None:
    """Puts a section of RESULTS in place of the one of that title, or at the end."""
    before = RESULTS.read_text() if RESULTS.exists() else "# Several processes, over gloo\n"
    head, *sections = before.split("\n## ")
    found = {section.partition("\n")[0]: section.rstrip() for section in sections}
    found[title] = "\n".join([title, "", *lines]).rstrip()
    RESULTS.write_text("\n\n## ".join([head.rstrip(), *found.values()]) + "\n")
    print(RESULTS.read_text())


def in_a_namespace(mbit: int) -> None:
    """This program again, where the loopback interface is a link of so many Mbit/s for both directions together."""
    link = f"ip link set lo up && tc qdisc add dev lo root tbf rate {mbit}mbit burst 256kb latency 100ms && exec \"$@\""
    os.execvp("unshare", ["unshare", "-n", "sh", "-c", link, "sh", sys.executable, "-m", "bench.bench_parallel",
                          "inside", str(mbit)])


def main(mbit: int = 0, rounds: int = 2) -> None:
    contenders = [(name, 1 if name == "none" else 2) for name in NAMES]
    seen: dict[str, list[dict[str, Any]]] = {name: [] for name, _ in contenders}
    for _ in range(rounds):  # in turn: the machine's speed drifts
        for name, ranks in contenders:
            seen[name].append(run(name, ranks))
            print(name, seen[name][-1], flush=True)
    losses = [rows[0]["loss"] for rows in seen.values()]
    assert max(losses) - min(losses) < 1e-4, losses
    command = f"python -m bench.bench_parallel{f' {mbit}' if mbit else ''}"
    lines = [
        f"`{command}`, torch {torch.__version__}, {platform.processor() or platform.machine()}, "
        f"{os.cpu_count()} cores, one thread a process. GPT of {MODEL}: {seen['none'][0]['every'] / 4e6:.1f} M "
        f"parameters, {BATCH} x {MODEL['max_seq_len']} tokens a step in all; medians of {rounds} runs. Losses agree to "
        f"{max(losses) - min(losses):.1e}.", "",
        "| | step, ms | tokens/s | times one process | communication and waiting | on the wire a step, MiB | "
        "the least, MiB | peak of a rank, MiB |", "|---|---|---|---|---|---|---|---|"]
    alone = statistics.median(row["tokens_per_second"] for row in seen["none"])
    for name, ranks in contenders:
        middle = {key: statistics.median(row[key] for row in seen[name]) for key in seen[name][0]}
        lines.append(
            f"| {NAMES[name]}, {ranks} process{'es' if ranks > 1 else ''} | {middle['step_ms']:.1f} | "
            f"{middle['tokens_per_second']:.0f} | {middle['tokens_per_second'] / alone:.2f} | {middle['share']:.0%} | "
            f"{middle['wire'] / 2**20:.1f} | {least(name, ranks, middle) / 2**20:.1f} | {middle['peak_mib']:.0f} |")
    write_section(f"A link of {mbit} Mbit/s" if mbit else "The loopback interface", lines)


if __name__ == "__main__":
    if sys.argv[1:2] == ["inside"]:
        main(int(sys.argv[2]))
    elif sys.argv[1:] and sys.argv[1].isdigit():
        in_a_namespace(int(sys.argv[1]))
    elif sys.argv[1:]:
        work(sys.argv[1])
    else:
        main()
