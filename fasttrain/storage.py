"""Durable files: what is written is on the disk, or an error was raised; what is read is what its SHA-256 says.

Files are opened through their directory's descriptor and links are never followed, so that a path swapped in between, a
link or a device in an untrusted directory is refused and not read. A private directory carries its owner's identity in
its name: what a killed process left behind can be told from what a living one is writing.
Deliberately left out: formats (manifest.py, tensorfile.py), and platforms without POSIX directory descriptors.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import os
import platform
import queue
import re
import secrets
import shutil
import stat
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np

CHUNK = 2**20  # bytes hashed and written at a time
SMALL = 2**18  # bytes hashed without a thread: below it one costs more than it saves
BEHIND = 256 * 2**20  # bytes by which hashing may lag behind writing
FOREIGN_ORPHAN_SECONDS = 24 * 3600.0  # private directories of another host or container are left alone this long

_PRIVATE = re.compile(r"\.inflight-(\d+)-(\d+)-([0-9a-f]{8})-[0-9a-f]{12}", re.ASCII)
_held: set[int] = set()  # descriptors of locks, to be closed in forked children
_in_use: set[str] = set()  # names of this process's private directories
_LANES = (np.arange(512, dtype=np.uint64) * 2 + 1) * np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: spreads bits
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


class CheckpointSpaceError(OSError):
    """Too little room (disk or quota). Attributes: `path`, `needed` and `free` in bytes."""

    def __init__(self, path: Path, needed: int, free: int) -> None:
        super().__init__(errno.ENOSPC, f"no room for {needed:,} bytes in {str(path)!r}: the disk has {free:,} free (a "
                         "quota may leave less); delete something or lower keep_last/keep_best. Earlier checkpoints "
                         "are intact", str(path))
        self.path, self.needed, self.free = path, needed, free

    def __str__(self) -> str:
        return str(self.strerror)


class DirectoryInUseError(RuntimeError):
    """Another writer holds the directory. Attributes: `path` and `pid` (None: it left no readable number)."""

    def __init__(self, path: Path, pid: int | None) -> None:
        owner = "this process" if pid == os.getpid() else "an unknown process" if pid is None else f"process {pid}"
        super().__init__(f"{str(path)!r} is in use by {owner}; let it end (or stop it), or choose another directory")
        self.path, self.pid = path, pid


def free_bytes(directory: Path) -> int:
    """What this user may still write on the file system of `directory`."""
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize


def require_space(directory: Path, needed: int) -> None:
    """Raises CheckpointSpaceError unless `needed` bytes and 1 MiB for directories and rounding are free."""
    free = free_bytes(directory)
    if free < needed + 2**20:
        raise CheckpointSpaceError(directory, needed, free)


@contextlib.contextmanager
def open_directory(path: Path | str, *, follow: bool = False) -> Iterator[int]:
    """A descriptor for use as `dir_fd`. With `follow`, the last component may be a link: for paths the user typed."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW))
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def open_regular(directory: int, name: str) -> Iterator[int]:
    """A descriptor of the regular file `name` in `directory` for reading.

    Links, devices, pipes and directories raise OSError. Hard links pass: backup tools make them, and a file that came
    from elsewhere is still used only if its hash is the one in the manifest.
    """
    assert "/" not in name and name not in ("", ".", ".."), name
    # Not blocking: opening a pipe that nobody writes to must not hang.
    descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", name)
        yield descriptor
    finally:
        os.close(descriptor)


def read_all(descriptor: int, max_bytes: int) -> bytes:
    """The whole file as bytes; OSError (EFBIG) if it is larger than `max_bytes`."""
    size = os.fstat(descriptor).st_size
    if size > max_bytes:
        raise OSError(errno.EFBIG, f"{size} bytes, at most {max_bytes} are read")
    return b"".join(_chunks(descriptor, 0, size))


def size_of(directory: int) -> int:
    """Bytes in the regular files of an open directory, links not followed."""
    with os.scandir(directory) as entries:
        files = (entry for entry in entries if entry.is_file(follow_symlinks=False))
        return sum(file.stat(follow_symlinks=False).st_size for file in files)


def hash_range(descriptor: int, start: int, end: int) -> str:
    """SHA-256 (hex) of the bytes [start, end), or of those that exist."""
    digest = hashlib.sha256()
    for chunk in _chunks(descriptor, start, end):
        digest.update(chunk)
    return digest.hexdigest()


def checksum(data: bytes | memoryview) -> int:
    """A 64-bit sum of the bytes as little-endian words, each times an odd constant of its place modulo 4 KiB.

    Any flipped bit changes it, at the speed of memory. It tells tensors apart; what can be trusted SHA-256 decides.
    """
    flat = np.frombuffer(data, dtype=np.uint8)
    whole = len(flat) - len(flat) % _LANES.nbytes
    sums = flat[:whole].view("<u8").reshape(-1, len(_LANES)).sum(axis=0, dtype=np.uint64)
    rest = np.zeros(_LANES.nbytes, dtype=np.uint8)
    rest[:len(flat) - whole] = flat[whole:]
    return int(((sums + rest.view("<u8")) * _LANES).sum(dtype=np.uint64))


def checksum_range(descriptor: int, start: int, end: int) -> int:
    """`checksum` of the bytes [start, end), or of those that exist."""
    return sum(map(checksum, _chunks(descriptor, start, end))) % 2**64


def write_file(directory: int, name: str, pieces: Iterable[bytes | memoryview],
               turn: AbstractContextManager[object] | None = None) -> tuple[int, str]:
    """Creates `name` in `directory`, writes the pieces, and fsyncs. Returns (size in bytes, SHA-256 in hex).

    The digest is taken of the very bytes that are handed to the kernel, by a second thread meanwhile: hashing and
    writing cost about the same, and neither holds the interpreter's lock. The fsync waits for no hash. `turn` is held
    while bytes are handed over: of several files that share a lock, one is written while the one before is still hashed
    and fsynced.
    """
    digest, size = _HashBehind(), 0
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(name, flags, 0o666, dir_fd=directory)
    try:
        with turn or nullcontext():
            for chunk in _cut(pieces):
                digest.update(chunk)
                size += len(chunk)
                while chunk:  # a write may be short, on a full disk or a signal
                    chunk = chunk[os.write(descriptor, chunk):]
        # Not earlier, bit by bit: that was slower, by what each commit of a journal costs.
        os.fsync(descriptor)
    finally:
        sha256 = digest.finish()
        os.close(descriptor)
    return size, sha256


def _cut(pieces: Iterable[bytes | memoryview]) -> Iterator[memoryview]:
    for piece in pieces:
        view = memoryview(piece)
        yield from (view[start:start + CHUNK] for start in range(0, len(view), CHUNK))


class _HashBehind:
    """SHA-256 of the chunks given, in order, on a thread of its own from the first large one on."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._queue: queue.Queue[memoryview | None] = queue.Queue(BEHIND // CHUNK)
        self._thread: threading.Thread | None = None

    def update(self, chunk: memoryview) -> None:
        if self._thread is None and len(chunk) < SMALL:
            self._digest.update(chunk)
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="fasttrain-hash", daemon=True)
            self._thread.start()
        self._queue.put(chunk)

    def _run(self) -> None:
        while (chunk := self._queue.get()) is not None:
            self._digest.update(chunk)

    def finish(self) -> str:
        """The digest in hex, once everything given is in it."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None
        return self._digest.hexdigest()


def make_directory(path: Path) -> None:
    """Creates `path` and its parents, durably: each new entry is fsynced in its parent."""
    missing = [path, *path.parents]
    missing = missing[:next((i for i, folder in enumerate(missing) if folder.exists()), len(missing))]
    for folder in reversed(missing):
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder)
        sync_directory(folder.parent)


def sync_directory(path: Path) -> None:
    """Makes the entries of `path` (names made, renamed, removed) durable."""
    with open_directory(path, follow=True) as descriptor:
        os.fsync(descriptor)


@contextlib.contextmanager
def private_directory(root: Path, needed: int) -> Iterator[Path]:
    """A new directory in `root` that only this call uses; what is left of it at the end, or after an error, is removed.

    Publish it by renaming it inside the block. An error for lack of room leaves as CheckpointSpaceError, which names
    `needed`; any other OSError without a file name gets the directory's.
    """
    path = root / _private_name()
    _in_use.add(path.name)
    try:
        os.mkdir(path)
        yield path
    except OSError as error:
        remove_quietly(path)
        if error.errno in _NO_SPACE and not isinstance(error, CheckpointSpaceError):
            raise CheckpointSpaceError(root, needed, free_bytes(root)) from error
        if error.filename is None:
            error.filename = str(root)
        raise
    finally:
        remove_quietly(path)
        _in_use.remove(path.name)


def remove_quietly(path: Path) -> None:
    """Removes a file or a directory tree without following links; what resists stays for a later collection."""
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return
    if stat.S_ISDIR(mode):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            os.unlink(path)


def retire(path: Path) -> None:
    """Removes a published directory: first renamed to a private name, so that nobody ever sees a part of it."""
    doomed = path.parent / _private_name()
    os.rename(path, doomed)
    remove_quietly(doomed)


def collect_orphans(root: Path) -> list[Path]:
    """Removes the private directories in `root` whose owner is gone, and returns them.

    Gone: no process has that pid, or one that started at another time, or this one has done with it. A directory made
    on another host or in another process namespace tells nothing of its owner: it goes after 24 hours without a change.
    """
    gone = []
    for entry in sorted(os.listdir(root)):
        found = _PRIVATE.fullmatch(entry)
        if found and _is_orphan(root / entry, int(found[1]), int(found[2]), found[3]):
            remove_quietly(root / entry)
            gone.append(root / entry)
    return gone


@contextlib.contextmanager
def lock_directory(root: Path | str) -> Iterator[None]:
    """Holds `root` (made if missing) for one writer; ends with the process, however that ends.

    Forked children (DataLoader workers) do not hold it, so a killed trainer can be restarted at once.
    Raises DirectoryInUseError naming the holder's pid. Where the file system has no locks, warns and goes on.
    """
    _register_release()
    root = Path(root)
    make_directory(root)
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(root / ".lock", flags, 0o666)
    _held.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            text = os.pread(descriptor, 32, 0).strip()
            raise DirectoryInUseError(root, int(text) if text.isdigit() else None) from None
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                raise
            warnings.warn(f"the file system of {str(root)!r} has no locks ({error.strerror}): a second writer cannot "
                          "be refused", stacklevel=3)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)
        yield
    finally:
        if descriptor in _held:  # not in a child of fork, which has closed it
            _held.remove(descriptor)
            os.close(descriptor)  # the file stays: removing it would let two processes lock two files of one name


@contextlib.contextmanager
def serialized(root: Path) -> Iterator[None]:
    """Renames of one step by two processes must not interleave; where the file system has no locks, they might."""
    with open_directory(root, follow=True) as descriptor:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                # Closing is not enough: a DataLoader worker forked meanwhile holds the same lock for an epoch.
                fcntl.flock(descriptor, fcntl.LOCK_UN)


@functools.cache
def _register_release() -> None:
    """Once per process, and not at import: a child of fork shares its parent's locks until it closes them."""
    def release() -> None:
        while _held:
            os.close(_held.pop())

    os.register_at_fork(after_in_child=release)


def _private_name() -> str:
    return f".inflight-{os.getpid()}-{_start_time(os.getpid())}-{_host()}-{secrets.token_hex(6)}"


def _chunks(descriptor: int, start: int, end: int) -> Iterator[bytes]:
    while start < end:
        chunk = os.pread(descriptor, min(CHUNK, end - start), start)
        if not chunk:
            return
        start += len(chunk)
        yield chunk


def _is_orphan(path: Path, pid: int, start: int, host: str) -> bool:
    if host != _host():
        with contextlib.suppress(OSError):
            return time.time() - os.lstat(path).st_mtime > FOREIGN_ORPHAN_SECONDS
        return False
    if pid == os.getpid():
        return path.name not in _in_use
    if start and Path("/proc/self/stat").exists():
        return _start_time(pid) != start
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False


def _start_time(pid: int) -> int:
    """Clock ticks from boot to the start of process `pid`: with the pid, an identity. 0: it is gone, or no /proc."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    fields = text.rpartition(")")[2].split()  # from the third on: the name in parentheses may hold anything
    return 0 if fields[0] in "ZX" else int(fields[19])  # a zombie writes no more


def _host() -> str:
    """Tells hosts and process namespaces apart: a pid means something only within one."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return hashlib.sha256(f"{platform.node()} {space}".encode()).hexdigest()[:8]
