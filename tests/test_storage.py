"""Durable files: what is refused, what is cleaned up, and who holds a directory."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fasttrain import storage


def in_child(work: Callable[[], None]) -> int:
    """Runs `work` in a forked child that ends without any cleanup; returns its exit status."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_written_file_has_the_size_and_hash_that_were_returned(tmp_path: Path) -> None:
    pieces = [b"", b"abc", memoryview(bytes(range(256)) * 20000), b"z"]
    with storage.open_directory(tmp_path) as directory:
        size, sha256 = storage.write_file(directory, "file", pieces)
        with storage.open_regular(directory, "file") as descriptor:
            assert storage.hash_range(descriptor, 0, size) == sha256
            assert storage.read_all(descriptor, size) == b"".join(pieces)
    assert hashlib.sha256((tmp_path / "file").read_bytes()).hexdigest() == sha256
    assert (tmp_path / "file").stat().st_size == size


def test_the_hash_of_a_file_that_is_written_faster_than_hashed_is_still_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class SlowDigest:
        def __init__(self) -> None:
            self.real = sha256()

        def update(self, chunk: memoryview) -> None:
            time.sleep(0.02)
            self.real.update(chunk)

        def hexdigest(self) -> str:
            return self.real.hexdigest()

    sha256 = hashlib.sha256
    monkeypatch.setattr(storage.hashlib, "sha256", SlowDigest)
    content = bytes(range(256)) * 20000
    with storage.open_directory(tmp_path) as directory:
        assert storage.write_file(directory, "file", [content]) == (len(content), sha256(content).hexdigest())


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:7]))
    with storage.open_directory(tmp_path) as directory:
        storage.write_file(directory, "file", [b"0123456789" * 10, b"end"])
    assert (tmp_path / "file").read_bytes() == b"0123456789" * 10 + b"end"


def test_an_existing_file_or_link_is_never_written_through(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"mine")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with storage.open_directory(tmp_path) as directory:
        for name in ("target", "link", "dangling"):
            with pytest.raises(FileExistsError):
                storage.write_file(directory, name, [b"theirs"])
    assert (tmp_path / "target").read_bytes() == b"mine"
    assert not (tmp_path / "nowhere").exists()


def test_only_regular_files_are_opened_and_a_pipe_does_not_hang(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"x")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "null").symlink_to("/dev/null")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with storage.open_directory(tmp_path) as directory:
        with storage.open_regular(directory, "real") as descriptor:
            assert storage.read_all(descriptor, 1) == b"x"
            with pytest.raises(OSError, match="at most 0"):
                storage.read_all(descriptor, 0)
        for name in ("link", "null", "folder", "pipe", "missing"):
            with pytest.raises(OSError), storage.open_regular(directory, name):
                pass
    with storage.open_directory("/dev") as directory, pytest.raises(OSError, match="not a regular file"), \
            storage.open_regular(directory, "zero"):
        pass


def test_a_directory_that_is_a_link_is_followed_only_on_request(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(OSError), storage.open_directory(tmp_path / "link"):
        pass
    with storage.open_directory(tmp_path / "link", follow=True) as directory:
        assert os.fstat(directory).st_ino == (tmp_path / "real").stat().st_ino


def test_space_is_refused_with_path_needed_and_free(tmp_path: Path) -> None:
    storage.require_space(tmp_path, 1000)
    with pytest.raises(storage.CheckpointSpaceError) as caught:
        storage.require_space(tmp_path, 2**62)
    error = caught.value
    assert error.needed == 2**62 and 0 < error.free < 2**62 and error.path == tmp_path
    assert error.errno == errno.ENOSPC
    for part in (str(tmp_path), f"{2**62:,}", f"{error.free:,}", "keep_last"):
        assert part in str(error)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_running_out_of_room_inside_becomes_a_space_error_and_leaves_nothing(tmp_path: Path, number: int) -> None:
    with pytest.raises(storage.CheckpointSpaceError, match="no room for 12,345 bytes"), \
            storage.private_directory(tmp_path, 12345) as private:
        (private / "half").write_bytes(b"1")
        raise OSError(number, os.strerror(number))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), RuntimeError("x"), KeyboardInterrupt()])
def test_any_error_inside_leaves_nothing_and_keeps_its_kind(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, storage.private_directory(tmp_path, 1) as private:
        (private / "folder").mkdir()
        (private / "folder" / "file").write_bytes(b"1")
        raise error
    assert os.listdir(tmp_path) == []
    if isinstance(error, OSError):
        assert str(tmp_path) in str(caught.value)


def test_what_was_renamed_away_survives_the_private_directory(tmp_path: Path) -> None:
    with storage.private_directory(tmp_path, 1) as private:
        (private / "file").write_bytes(b"1")
        os.rename(private, tmp_path / "published")
    assert os.listdir(tmp_path) == ["published"]


def test_a_dead_process_leaves_an_orphan_that_is_collected(tmp_path: Path) -> None:
    def die_inside() -> None:
        with storage.private_directory(tmp_path, 1) as private:
            (private / "file").write_bytes(b"1")
            os._exit(0)

    in_child(die_inside)
    assert len(os.listdir(tmp_path)) == 1
    assert [path.name for path in storage.collect_orphans(tmp_path)] and os.listdir(tmp_path) == []


def test_a_zombie_is_dead(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        with storage.private_directory(tmp_path, 1):
            os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert len(storage.collect_orphans(tmp_path)) == 1
    os.waitpid(pid, 0)


def test_a_living_process_and_strangers_files_are_left_alone(tmp_path: Path) -> None:
    code = ("import sys, pathlib; from fasttrain import storage\n"
            "with storage.private_directory(pathlib.Path(sys.argv[1]), 1): print('in', flush=True); sys.stdin.read()")
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline() == b"in\n"
    (tmp_path / ".inflight-notes").mkdir()
    with storage.private_directory(tmp_path, 1) as mine:
        before = set(os.listdir(tmp_path))
        assert mine.name in before and len(before) == 3
        assert storage.collect_orphans(tmp_path) == []
        assert set(os.listdir(tmp_path)) == before
        child.kill()
        child.communicate()
        assert len(storage.collect_orphans(tmp_path)) == 1
    assert os.listdir(tmp_path) == [".inflight-notes"]


def test_a_reused_pid_is_not_taken_for_the_owner(tmp_path: Path) -> None:
    with storage.private_directory(tmp_path, 1) as private:
        _, _, pid, start, host, tail = private.name.replace(".", "-").split("-")
    parent = os.getppid()
    reused = tmp_path / f".inflight-{parent}-{int(start) + 1}-{host}-{tail}"
    own = tmp_path / f".inflight-{pid}-{int(start) - 1}-{host}-{tail}"
    reused.mkdir()
    own.mkdir()
    assert set(storage.collect_orphans(tmp_path)) == {reused, own}


def test_another_hosts_directory_goes_only_after_a_day(tmp_path: Path) -> None:
    young, old = (tmp_path / f".inflight-1-2-00000000-{digit * 12}" for digit in "ab")
    young.mkdir()
    old.mkdir()
    past = time.time() - 25 * 3600
    os.utime(old, (past, past))
    assert storage.collect_orphans(tmp_path) == [old]


def test_collecting_does_not_follow_a_link(tmp_path: Path) -> None:
    treasure = tmp_path / "treasure"
    treasure.mkdir()
    (treasure / "file").write_bytes(b"1")
    root = tmp_path / "root"
    root.mkdir()

    def die_inside() -> None:
        with storage.private_directory(root, 1) as private:
            (private / "link").symlink_to(treasure)
            os._exit(0)

    in_child(die_inside)
    name = os.listdir(root)[0]
    assert storage.collect_orphans(root) and (treasure / "file").exists()
    (root / name).symlink_to(treasure)
    assert storage.collect_orphans(root) and (treasure / "file").exists() and os.listdir(root) == []


def test_retiring_renames_before_it_removes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "step"
    target.mkdir()
    (target / "file").write_bytes(b"1")
    seen: list[bool] = []
    unlink = os.unlink

    def spy(path: str, **options: int) -> None:
        seen.append(target.exists())
        unlink(path, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "unlink", spy)
    storage.retire(target)
    assert seen == [False] and os.listdir(tmp_path) == []


def test_new_directories_are_fsynced_in_their_parents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def spy(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", spy)
    storage.make_directory(tmp_path / "a" / "b")
    assert synced == [str(tmp_path), str(tmp_path / "a")]
    storage.make_directory(tmp_path / "a" / "b")
    assert len(synced) == 2


HOLD = """
import sys
from fasttrain.storage import lock_directory
with lock_directory(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def holder(root: Path):  # type: ignore[no-untyped-def]
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None and child.stdout.readline() == b"held\n"
        yield child
    finally:
        child.kill()
        child.communicate()


def test_a_second_writer_is_refused_with_the_holders_pid_until_it_dies(tmp_path: Path) -> None:
    root = tmp_path / "new" / "root"
    with holder(root) as child:
        with pytest.raises(storage.DirectoryInUseError, match=f"process {child.pid}") as caught, \
                storage.lock_directory(root):
            pytest.fail("two writers")
        assert caught.value.pid == child.pid and str(root) in str(caught.value)
        child.send_signal(signal.SIGKILL)
        child.wait()
        with storage.lock_directory(root):
            assert (root / ".lock").read_text() == f"{os.getpid()}\n"


def test_the_same_process_cannot_lock_twice_but_again_afterwards(tmp_path: Path) -> None:
    with storage.lock_directory(tmp_path):
        with pytest.raises(storage.DirectoryInUseError, match="this process"), storage.lock_directory(tmp_path):
            pytest.fail("two writers")
        with pytest.raises(storage.DirectoryInUseError), storage.lock_directory(tmp_path):
            pytest.fail("the refused attempt released the lock")
    with storage.lock_directory(tmp_path):
        pass


def test_a_forked_child_does_not_hold_its_dead_parents_lock(tmp_path: Path) -> None:
    read, write = os.pipe()
    trainer = os.fork()
    if trainer == 0:
        with storage.lock_directory(tmp_path):
            worker = os.fork()  # as a DataLoader does
            if worker == 0:
                time.sleep(30)
                os._exit(0)
            os.write(write, b"%d\n" % worker)
            os._exit(0)
    worker = int(os.read(read, 32))
    os.waitpid(trainer, 0)
    deadline = time.monotonic() + 20
    try:
        while True:  # the child needs an instant to have closed its copy
            try:
                with storage.lock_directory(tmp_path):
                    break
            except storage.DirectoryInUseError:
                assert time.monotonic() < deadline, "the worker kept the lock"
                time.sleep(0.01)
    finally:
        os.kill(worker, signal.SIGKILL)
        os.close(read)
        os.close(write)


def test_a_lock_file_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"keep me")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / ".lock").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError), storage.lock_directory(tmp_path / "root"):
        pytest.fail("followed")
    assert (tmp_path / "victim").read_bytes() == b"keep me"
