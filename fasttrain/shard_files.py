"""One checkpoint written by all ranks: each writes its own tree beside the others', rank 0 seals the manifest.

Tree `rank_00003` holds what only rank 3 has: its parts of spread tensors and its generators. Rank 0 makes the private
directory and says so; each other rank writes, fsyncs and reads back its files and reports their hashes; when all are
in, rank 0 seals and renames, and says so. So nobody ever sees a directory in which a rank's file is missing, whoever
dies and when. They talk through the launcher's store, not by collective calls: saves run on threads of their own.
Left out: what a part is (shards.py), and when to save (saver.py).
"""

from __future__ import annotations

import errno
import json
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .distributed import Team
from .manifest import Manifest, TreeEntry, is_rank_tree, tree_from_json, tree_of_rank, tree_to_json
from .shards import divided
from .storage import open_directory
from .treefiles import describe, write_trees
from .utils import capture_rng

_GRACE = 5.0  # seconds that a save still has once the training has failed


def trees_of_rank(trees: Mapping[str, Any], team: Team) -> dict[str, Any]:
    """What this rank writes of a run's state: rank 0 what all share, and each what it alone has."""
    if team.is_alone:
        return dict(trees)
    common, parts = divided(trees)
    own = {tree_of_rank(team.rank): {"parts": parts, "rng": capture_rng()}}
    return {**common, **own} if team.leads else own


def tree_of_generators(manifest: Manifest, team: Team) -> str | None:
    """The tree whose "rng" is the state of this rank's generators; rank 0's is that of a run of one process, "rng"
    itself. None where another number of ranks wrote the checkpoint: the others' are then seeded anew."""
    if team.leads:
        return "rng"
    writers = sum(map(is_rank_tree, manifest.trees))
    return tree_of_rank(team.rank) if writers == team.world_size else None


class SharedSave:
    """One save of a team: what its ranks tell each other. Used from one thread of each rank; `give_up` from any."""

    def __init__(self, team: Team) -> None:
        assert team.store is not None
        self._team, self._store = team, team.store
        self._place = f"save/{team.number()}"
        self._end = threading.Event()
        self._latest = 0.0

    def announce(self, private: Path) -> None:
        """Rank 0: the others may write there from now on."""
        self._store.set(f"{self._place}/directory", private.name)

    def collect(self, metadata: dict[str, Any]) -> dict[str, TreeEntry]:
        """Rank 0: waits for all others, and returns the entries of their trees. `metadata["finite"]` becomes false if
        some rank's weights are not finite. OSError names a rank that failed or did not come."""
        entries: dict[str, TreeEntry] = {}
        for rank in range(1, self._team.world_size):
            said = json.loads(self._wait(f"rank/{rank}", f"rank {rank} has not written its part of the checkpoint"))
            if "problem" in said:
                raise OSError(errno.EIO, f"rank {rank} could not write its part: {said['problem']}")
            name = tree_of_rank(rank)
            entries[name] = tree_from_json(name, said["entry"])
            metadata["finite"] = bool(metadata.get("finite")) and said["finite"]
        return entries

    def conclude(self, name: str, problem: str = "") -> None:
        """Rank 0: tells the others what became of it."""
        self._store.set(f"{self._place}/end", json.dumps({"name": name, "problem": problem}))

    def write_part(self, root: Path, trees: Mapping[str, tuple[bytes, Mapping[str, Tensor]]], finite: bool,
                   read_back: Any) -> Path:
        """Another rank: writes its tree and returns the checkpoint's path once it is published.

        Args:
            read_back: (directory, name, entry) -> reads a tree's files from the disk and raises if they differ.
        """
        directory_name = self._wait("directory", "rank 0 has not begun the checkpoint")
        try:
            with open_directory(root / directory_name) as directory:
                (name, entry), = write_trees(directory, trees).items()
                read_back(directory, name, entry)
            said: dict[str, Any] = {"entry": tree_to_json(name, entry), "finite": finite}
        except (OSError, ValueError) as error:
            said = {"problem": describe(error)}
        self._store.set(f"{self._place}/rank/{self._team.rank}", json.dumps(said))
        if "problem" in said:
            raise OSError(errno.EIO, said["problem"])
        end = json.loads(self._wait("end", "rank 0 has not finished the checkpoint"))
        if end["problem"]:
            raise OSError(errno.EIO, f"rank 0: {end['problem']}")
        return root / str(end["name"])

    def give_up(self) -> None:
        """The training has failed: what is not there in a few seconds will not come."""
        self._latest = time.monotonic() + min(_GRACE, self._team.timeout)
        self._end.set()

    def _wait(self, key: str, problem: str) -> str:
        start, pause = time.monotonic(), 0.002
        while not self._store.check([f"{self._place}/{key}"]):
            now = time.monotonic()
            if now - start > self._team.timeout or (self._end.is_set() and now > self._latest):
                raise OSError(errno.ETIMEDOUT, f"{problem} after {now - start:.0f} s")
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
        text: str = self._store.get(f"{self._place}/{key}").decode()
        return text


