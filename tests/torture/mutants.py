"""Mutation of the safety code: each line below breaks one guarantee, and the suite must notice."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class Mutant:
    """`old` in `file` becomes `new`."""

    name: str
    file: str
    old: str
    new: str


MUTANTS = [
    Mutant("no fsync of files", "storage.py", "        os.fsync(descriptor)\n    finally:", "    finally:"),
    Mutant("no fsync of the private directory", "checkpointing.py", "            os.fsync(directory)\n", ""),
    Mutant(
        "no fsync of the parent",
        "checkpointing.py",
        "        raise\n    sync_directory(final.parent)",
        "        raise",
    ),
    Mutant(
        "the manifest is sealed before the files",
        "checkpointing.py",
        "            sealed = seal_manifest(replace(draft, trees=trees))\n",
        "",
    ),
    Mutant(
        "written in place",
        "checkpointing.py",
        "private_directory(root, needed) as private:\n",
        "private_directory(root, needed) as private:\n        final.mkdir(exist_ok=True); private = final\n",
    ),
    Mutant(
        "no hash check of tensors",
        "treefiles.py",
        "if hashed and hash_range(descriptor, 0, entry.size) != ",
        "if False and hash_range(descriptor, 0, entry.size) != ",
    ),
    Mutant(
        "no hash check of plain data",
        "treefiles.py",
        "if hashlib.sha256(text).hexdigest() != entry",
        "if False and hashlib.sha256(text).hexdigest() != entry",
    ),
    Mutant(
        "no seal of the manifest",
        "manifest.py",
        "if hashlib.sha256(text).hexdigest().encode() != sealed[1]:",
        "if False:",
    ),
    Mutant("no size check", "treefiles.py", "    if size != entry.size:", "    if False:"),
    Mutant(
        "links are followed",
        "storage.py",
        "os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK",
        "os.O_RDONLY | os.O_NONBLOCK",
    ),
    Mutant(
        "anything is a regular file", "storage.py", "if not stat.S_ISREG(os.fstat(descriptor).st_mode):", "if False:"
    ),
    Mutant("pruned before it is verified", "retention.py", "    if problems:\n", "    if False:\n"),
    Mutant(
        "the last finite one goes",
        "retention.py",
        "        if values[path] is not None:  # a",
        "        if False:  # a",
    ),
    Mutant(
        "the replaced one goes first",
        "checkpointing.py",
        "                os.rename(final, backup)",
        "                retire(final)",
    ),
    Mutant(
        "orphans stay", "storage.py", "            remove_quietly(root / entry)\n            gone", "            gone"
    ),
    Mutant("short writes are not continued", "storage.py", "while chunk:  # a write", "if chunk:  # a write"),
    Mutant("no copy before the step goes on", "saver.py", "plain = self._arena.copy(plain)", "pass"),
    Mutant(
        "errors of the writer are swallowed",
        "saver.py",
        "            outcome.error = error\n",
        "            outcome.path = self.root\n",
    ),
    Mutant("no reading back", "saver.py", "            if problems:\n", "            if False:\n"),
    Mutant(
        "no waiting at the end", "session.py", "                saver.collect(wait=True)\n", "                pass\n"
    ),
    Mutant("the hash is not waited for", "storage.py", "            self._thread.join()\n", ""),
    Mutant("errors of a file's thread are swallowed", "treefiles.py", "    if errors:\n", "    if False:\n"),
    Mutant(
        "no lock",
        "storage.py",
        "            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "            pass",
    ),
]


def killed(mutant: Mutant) -> bool:
    """Whether the tests fail on a copy of the package with the mutant in it."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        shutil.copytree(
            ROOT / "fasttrain", copy / "fasttrain", symlinks=False, ignore=shutil.ignore_patterns("__pycache__")
        )
        shutil.copytree(ROOT / "tests", copy / "tests", ignore=shutil.ignore_patterns("__pycache__", "ops"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        target = copy / "fasttrain" / mutant.file
        text = target.read_text()
        assert text.count(mutant.old) == 1, f"{mutant.name}: {text.count(mutant.old)} places"
        target.write_text(text.replace(mutant.old, mutant.new))
        tests = ["test_saver.py", "test_storage.py", "test_checkpointing.py", "test_checkpoint_damage.py"]
        environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "pytest",
                "-x",
                "-q",
                "-p",
                "no:cacheprovider",
                *(str(copy / "tests" / name) for name in tests),
            ],
            cwd=copy,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        if done.returncode not in (0, 1):
            raise RuntimeError(f"{mutant.name}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        return done.returncode == 1
