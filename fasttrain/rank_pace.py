"""How fast each rank is, between two records: its own tokens, its time in communication, and whom the others wait for.

Ranks that train together finish each step together, so tokens per second tell them apart only where their batches
differ. What does is the time a rank spends outside of communication: the one with the most is the one the others wait
for, in their collective calls. Left out: a GPU's own time in communication, which the host does not see.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

from torch import Tensor

from .distributed import Team

MAX_RANKS = 64
"""A record names this many ranks, the slowest ones of larger teams."""


class RankPace:
    """Counts on one rank; `figures` brings all ranks' counts together."""

    def __init__(self, team: Team) -> None:
        self._team = team
        self._targets: Tensor | int = 0
        self._start, self._told = time.perf_counter(), team.seconds

    def count(self, num_targets: Tensor) -> None:
        """Adds this rank's targets of a step: () on any device, without waiting for it."""
        self._targets = self._targets + num_targets

    def figures(self) -> dict[str, Any]:
        """Since the last call, for a record: lists with one number for each of `rank_numbers`, and the slowest rank.
        Every rank must call it, and all get the same.

        `rank_tokens_per_second` counts the rank's own targets, `rank_communication_share` is its host's time in
        collective calls, waiting included, of the whole; `slowest_rank` spends the most seconds outside of them, by the
        share `slowest_rank_behind` more than the median rank.
        """
        team, now = self._team, time.perf_counter()
        mine = [float(self._targets), now - self._start, team.seconds - self._told]
        self._targets, self._start, self._told = 0, now, team.seconds
        table = [0.0] * (3 * team.world_size)
        table[3 * team.rank:3 * team.rank + 3] = mine
        everyone = team.add(table)
        tokens, seconds, told = everyone[0::3], [max(value, 1e-9) for value in everyone[1::3]], everyone[2::3]
        busy = [max(whole - part, 0.0) for whole, part in zip(seconds, told)]
        order = sorted(range(team.world_size), key=lambda rank: -busy[rank])
        named = list(range(team.world_size)) if team.world_size <= MAX_RANKS else order[:MAX_RANKS]
        median = statistics.median(busy)
        return {
            "rank_numbers": named,
            "rank_tokens_per_second": [round(tokens[rank] / seconds[rank], 1) for rank in named],
            "rank_communication_share": [round(told[rank] / seconds[rank], 4) for rank in named],
            "slowest_rank": order[0],
            "slowest_rank_behind": round(busy[order[0]] / median - 1.0, 4) if median else 0.0,
        }
