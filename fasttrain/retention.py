"""Which checkpoints stay: the last N, the best K, every T-th step, and always one that can be trusted.

The classes are separate: a checkpoint stays if any of them wants it. Nothing goes before the newest one has been read
back from the disk and found whole, so that at every instant there is a good one.
Deliberately left out: when to prune (saver.py) and how one is verified (checkpointing.py).
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

from fasttrain.checkpointing import CheckpointError, list_checkpoints, read_manifest, verify_checkpoint
from fasttrain.manifest import Manifest
from fasttrain.storage import retire, serialized


def prune_checkpoints(root: Path | str, *, keep_last: int, keep_best: int, keep_every_steps: int = 0,
                      protect: Iterable[Path | str] = (), metric: str = "val_loss",
                      verified: Path | None = None) -> list[Path]:
    """Removes old checkpoints and returns their paths.

    Kept: the last `keep_last` (0: all), the `keep_best` of lowest finite metadata[metric] (the later of equals), those
    whose step is a multiple of `keep_every_steps` (0: none), those in `protect`, and the newest finite one if a newer
    one's metric is NaN or infinite or its metadata say that its weights are not ("finite": false). Directories without
    a readable manifest are neither counted nor removed.

    Nothing is removed unless the newest verifies, re-read from the disk; if it does not, a RuntimeWarning says so.
    `verified` is a checkpoint that the caller has verified just now; it is not read a second time.
    """
    if min(keep_last, keep_best, keep_every_steps) < 0:
        raise ValueError(f"keep_last is {keep_last}, keep_best {keep_best}, keep_every_steps {keep_every_steps}; none "
                         "may be negative (keep_last 0: all)")
    paths = list_checkpoints(root)
    if keep_last == 0 or not paths:
        return []
    problems = [] if paths[-1] == verified else verify_checkpoint(paths[-1])
    if problems:
        warnings.warn(f"nothing is pruned: the newest checkpoint {str(paths[-1])!r} is damaged: {'; '.join(problems)}",
                      RuntimeWarning, stacklevel=2)
        return []
    manifests = _manifests(paths)
    kept = _kept(manifests, metric, keep_last, keep_best)
    shielded = {Path(path).resolve() for path in protect}
    removed = []
    for path, manifest in manifests.items():
        milestone = keep_every_steps > 0 and manifest.step % keep_every_steps == 0
        if not milestone and path not in kept and path.resolve() not in shielded:
            with serialized(Path(root)), contextlib.suppress(FileNotFoundError):
                retire(path)
                removed.append(path)
    return removed


def _kept(manifests: Mapping[Path, Manifest], metric: str, keep_last: int, keep_best: int) -> set[Path]:
    """The rule on the metric, for manifests oldest first."""
    values = {path: _measured(manifest, metric) for path, manifest in manifests.items()}
    finite = [(value, -age, path) for age, (path, value) in enumerate(values.items()) if value is not None
              and math.isfinite(value)]
    kept = {*list(manifests)[-keep_last:], *(path for _, _, path in sorted(finite)[:keep_best])}
    good = {path for _, _, path in finite}
    good |= {path for path, value in values.items() if value is None and manifests[path].metadata.get("finite") is True}
    for path in reversed(values):
        if path in good:
            break
        if values[path] is not None:  # a newer one is known to be bad: the newest good one is not displaced by it
            kept.update([path for path in values if path in good][-1:])
            break
    return kept


def _manifests(paths: Iterable[Path]) -> dict[Path, Manifest]:
    manifests = {}
    for path in paths:
        with contextlib.suppress(CheckpointError):
            manifests[path] = read_manifest(path)
    return manifests


def _measured(manifest: Manifest, metric: str) -> float | None:
    """The metric; NaN for weights that are known not to be finite; None if nothing is known."""
    if manifest.metadata.get("finite") is False:
        return math.nan
    value = manifest.metadata.get(metric)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
