"""Power cuts: the operations of a save are recorded, and every disk that a POSIX file system may be left with is built.

The model: bytes of a file are safe after its fsync, names in a directory after the directory's fsync; before that each
write may be lost, zeroed or halved, and names may arrive in any order that keeps one rename whole. An image is made for
each prefix of the operations: everything arrived; nothing did that was not synced; each one pending name alone missing
or alone there; and each of these with the unsynced bytes there, lost, zeroed or halved.
"""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Names = dict[str, Any]  # name -> inode number, in one directory; directories are tables of their own
Op = tuple[Any, ...]


def record(root: Path, work: Callable[[], object]) -> list[Op]:
    """What `work` does below `root`: (create, path), (write, path, bytes), (fsync, path), (rename, a, b), ..."""
    ops: list[Op] = []
    names = ("open", "write", "fsync", "fdatasync", "rename", "mkdir", "unlink", "rmdir")
    real = {name: getattr(os, name) for name in names}

    def where(target: Any, dir_fd: int | None = None) -> str:
        if isinstance(target, int):
            return os.path.relpath(os.readlink(f"/proc/self/fd/{target}"), root)
        base = os.readlink(f"/proc/self/fd/{dir_fd}") if dir_fd is not None else ""
        return os.path.relpath(os.path.join(base, os.fspath(target)), root)

    def opened(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        descriptor: int = real["open"](path, flags, mode, dir_fd=dir_fd)
        if flags & os.O_CREAT:
            ops.append(("create", where(path, dir_fd)))
        return descriptor

    def written(descriptor: int, data: Any) -> int:
        count: int = real["write"](descriptor, data)
        ops.append(("write", where(descriptor), bytes(data[:count])))
        return count

    def synced(descriptor: int) -> None:
        real["fsync"](descriptor)
        ops.append(("fsync", where(descriptor)))

    def two(a: Any, b: Any) -> None:
        real["rename"](a, b)
        ops.append(("rename", where(a), where(b)))

    def one(name: str) -> Callable[..., None]:
        def call(path: Any, *args: Any, dir_fd: int | None = None) -> None:
            place = where(path, dir_fd)
            real[name](path, *args, dir_fd=dir_fd)
            ops.append((name, place))

        return call

    patched = {
        "open": opened,
        "write": written,
        "fsync": synced,
        "fdatasync": synced,
        "rename": two,
        **{name: one(name) for name in ("mkdir", "unlink", "rmdir")},
    }
    try:
        for name, call in patched.items():
            setattr(os, name, call)
        work()
    finally:
        for name, call in real.items():
            setattr(os, name, call)
    return ops


class Disk:
    """Durable and present contents: files by inode, names by directory."""

    def __init__(self, start: Path) -> None:
        self.bytes: dict[int, list[bytes]] = {}  # inode -> [durable, present]
        self.durable: dict[str, int | None] = {}  # path -> inode; None: a directory
        self.present: dict[str, int | None] = {}
        self.pending: list[Op] = []  # changes of names: (directory, remove path or None, add path or None, inode)
        self.numbers = itertools.count()
        for path in sorted(start.rglob("*")):
            name = os.path.relpath(path, start)
            self.durable[name] = self._new(path.read_bytes()) if path.is_file() else None
        self.present = dict(self.durable)

    def _new(self, data: bytes) -> int:
        number = next(self.numbers)
        self.bytes[number] = [data, data]
        return number

    def apply(self, op: Op) -> None:
        kind, path = op[0], op[1]
        if kind == "create":
            if path not in self.present:
                number = self._new(b"")
                self._change(None, path, number)
        elif kind == "mkdir":
            self._change(None, path, None)
        elif kind in ("unlink", "rmdir"):
            self._change(path, None, None)
        elif kind == "rename":
            self._change(path, op[2], self.present[path])
        elif kind == "write":
            self.bytes[self.present[path]][1] += op[2]  # type: ignore[index]
        elif kind == "fsync":
            inode = self.present.get(path)
            if inode is not None:
                self.bytes[inode][0] = self.bytes[inode][1]
            else:
                folder = "" if path == "." else path
                done = [change for change in self.pending if change[0] == folder]
                self.pending = [change for change in self.pending if change[0] != folder]
                self.durable = self._with(self.durable, done)

    def _change(self, old: str | None, new: str | None, inode: int | None) -> None:
        change = (os.path.dirname(old or new or ""), old, new, inode)
        self.pending.append(change)
        self.present = self._with(self.present, [change])

    @staticmethod
    def _with(names: dict[str, int | None], changes: list[Op]) -> dict[str, int | None]:
        names = dict(names)
        for _, old, new, inode in changes:
            moved = {
                path: value
                for path, value in names.items()
                if old is not None and (path == old or path.startswith(old + "/"))
            }
            for path in moved:
                del names[path]
            if new is not None:
                names[new] = inode
                names.update({new + path[len(old or "") :]: value for path, value in moved.items() if path != old})
        return names

    def images(self) -> Iterator[dict[str, bytes | None]]:
        pending = self.pending
        choices = [pending, []]
        choices += [pending[:i] + pending[i + 1 :] for i in range(len(pending))]
        choices += [[change] for change in pending]
        for chosen in choices:
            names = self._with(self.durable, chosen)
            for fate in ("there", "lost", "zeroed", "half"):
                yield {path: None if inode is None else self._content(inode, fate) for path, inode in names.items()}

    def _content(self, inode: int, fate: str) -> bytes:
        safe, now = self.bytes[inode]
        if fate == "there" or safe == now:
            return now
        fresh = now[len(safe) :]
        return safe + {"lost": b"", "zeroed": b"\0" * len(fresh), "half": fresh[: len(fresh) // 2]}[fate]


def crash_images(
    prepare: Callable[[Path], object], work: Callable[[Path], object]
) -> Iterator[dict[str, bytes | None]]:
    """Every image, once, of a power cut during `work` after `prepare` (which is all on the disk)."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        root = Path(folder) / "root"
        root.mkdir()
        prepare(root)
        disk = Disk(root)
        ops = record(root, lambda: work(root))
    seen = set()
    for op in [("fsync", "nowhere"), *ops]:
        if op[1] != "nowhere":
            disk.apply(op)
        for image in disk.images():
            key = hash(tuple(sorted((path, data or b"<dir>") for path, data in image.items())))
            if key not in seen:
                seen.add(key)
                yield image


def build(image: dict[str, bytes | None], root: Path) -> None:
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    for path, data in sorted(image.items()):
        target = root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if data is None:
            target.mkdir(exist_ok=True)
        else:
            target.write_bytes(data)
