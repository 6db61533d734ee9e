"""Text from where people keep it: files, folders, globs, JSONL fields, standard input, Python's own library.

A corpus is a sorted list of files, and a file is one document (a JSONL line is one). Documents are streamed, and a
long file comes in parts, so memory does not grow with the corpus. Text is taken as it is: UTF-8, no cleaning, no
newline translation. Nothing is skipped for being unreadable: a file that is not text is an error that names it.
Left out: compressed files, other encodings, downloads.
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import json
import os
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, TypeAlias

Source: TypeAlias = "str | Path | Sequence[str | Path]"
Split = Literal["train", "val"]

STDIN = "-"
STDLIB = "stdlib"
PART_BYTES = 1 << 20  # of a long file, read at once; also what bounds the memory of the tokenizer

_JSONL = re.compile(r"(?P<path>.*\.jsonl)(?::(?P<field>[^:/\\]+))?", re.DOTALL)
# What is in a standard library but is no text of it: tests (some undecodable on purpose), other people's packages,
# and files that describe one machine's build.
_STDLIB_SKIPPED = {"test", "tests", "idle_test", "lib2to3", "site-packages", "dist-packages"}


@dataclass(frozen=True)
class Document:
    """One text. `name` is stable: it does not depend on the other documents or on where the corpus lies."""

    name: str
    text: str
    part: int = 0
    """A file of PART_BYTES or more comes as several documents of one name with part 0, 1, 2, ..."""


@dataclass(frozen=True)
class CorpusFile:
    """A file of the corpus: what its documents are called, where it lies, and how it is read."""

    name: str
    path: Path | None
    """None: standard input."""
    field: str | None = None
    """The JSONL field that holds the text; None for plain text."""

    def stamp(self) -> tuple[str, str | None, int, int]:
        """Changes when the file's content does, as far as size and modification time tell."""
        assert self.path is not None, "standard input must be stored in a file first"
        status = self.path.stat()
        return (self.name, self.field, status.st_size, status.st_mtime_ns)


def read_documents(source: Source) -> Iterator[Document]:
    """The corpus's documents, in an order that depends on the file names only. Empty texts are left out.

    source: a file; a folder (recursive; hidden files are left out); a glob (`data/**/*.txt`); `path.jsonl` or
    `path.jsonl:field` (default field "text"); "-" for standard input; "stdlib" for the .py files of the running
    Python's standard library; or a list of these.
    Raises ValueError for a missing path (at once), and while reading for a file that is not UTF-8 text, a JSONL
    line that is not an object with that field, and a corpus without any text.
    """
    return read_files(list_files(source))


def list_files(source: Source) -> list[CorpusFile]:
    """The files behind a source, sorted within each of its entries; ValueError if an entry has none."""
    entries = [source] if isinstance(source, (str, Path)) else list(source)
    if not entries:
        raise ValueError("the corpus is an empty list; name at least one file, folder, glob or 'stdlib'")
    return [file for entry in entries for file in _list_entry(str(entry))]


def read_files(files: Sequence[CorpusFile]) -> Iterator[Document]:
    """The documents of these files; ValueError at the end if there was no text at all."""
    empty = True
    for file in files:
        for document in _read_file(file):
            empty = False
            yield document
    if empty:
        first = files[0].path or "standard input"
        raise ValueError(f"the corpus has no text: {len(files)} file(s), all empty (first: {first}); name other files")


def split_documents(files: Sequence[CorpusFile], *, val_fraction: float, seed: int) -> Iterator[tuple[Split, Document]]:
    """Each document with its split, decided by a hash of (seed, its name): adding documents never moves another.

    A corpus that is one plain text file is divided inside: its last `val_fraction` bytes, from the next line start
    on, are the validation text.
    """
    if not 0.0 < val_fraction < 1.0:
        raise ValueError(f"val_fraction is {val_fraction}; it must lie strictly between 0 and 1")
    if len(files) == 1 and files[0].field is None:
        yield from _split_inside(files[0], val_fraction)
        return
    for document in read_files(files):
        digest = hashlib.blake2b(f"{seed}\0{document.name}".encode(), digest_size=8).digest()
        yield "val" if int.from_bytes(digest, "little") < val_fraction * 2**64 else "train", document


def spool_stdin(folder: Path) -> CorpusFile:
    """Standard input as a file in `folder`, named by its content, so that it can be read more than once."""
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    partial = folder / f".stdin.{os.getpid()}.partial"
    try:
        with open(partial, "wb") as spool:
            while block := sys.stdin.buffer.read(PART_BYTES):
                digest.update(block)
                spool.write(block)
            spool.flush()
            os.fsync(spool.fileno())
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    path = folder / f"stdin-{digest.hexdigest()[:16]}.txt"
    if path.exists():  # the same text as before: keep the old file, and with it the tokens made from it
        partial.unlink()
    else:
        os.replace(partial, path)
    return CorpusFile("stdin", path)


def _list_entry(entry: str) -> list[CorpusFile]:
    if entry == STDIN:
        return [CorpusFile("stdin", None)]
    if entry == STDLIB:
        return _list_stdlib()
    path = Path(entry)
    if path.is_dir():
        files = [_corpus_file(path, file, None) for file in _walk(path)]
        if not files:
            raise ValueError(f"folder {entry!r} holds no files (hidden ones are not read); name a folder with text")
        return files
    if path.is_file():
        return [_corpus_file(path.parent, path, None)]
    match = _JSONL.fullmatch(entry)
    field = match["field"] if match else None
    pattern = match["path"] if match else entry
    if Path(pattern).is_file():
        return [_corpus_file(Path(pattern).parent, Path(pattern), field)]
    if glob.has_magic(pattern):
        base = Path(*_fixed_parts(Path(pattern)))
        found = sorted(Path(name) for name in glob.glob(pattern, recursive=True) if Path(name).is_file())
        if not found:
            raise ValueError(f"no file matches {pattern!r}; `**` crosses folders, and the pattern is relative to "
                             f"{str(Path.cwd())!r}")
        return [_corpus_file(base, file, field) for file in found]
    raise ValueError(f"{entry!r} does not exist; give a file, a folder, a glob, path.jsonl:field, '-' for standard "
                     f"input, or 'stdlib'")


def _corpus_file(base: Path, path: Path, field: str | None) -> CorpusFile:
    if path.suffix == ".jsonl":
        field = field or "text"
    elif field is not None:
        raise ValueError(f"{str(path)!r} is no .jsonl file, so it has no field {field!r}; name the file alone")
    return CorpusFile(path.relative_to(base).as_posix(), path, field)


def _fixed_parts(pattern: Path) -> Iterator[str]:
    for part in pattern.parts[:-1]:
        if glob.has_magic(part):
            return
        yield part


def _walk(root: Path, skipped: Iterable[str] = ()) -> list[Path]:
    """The files below a folder, sorted by their relative path. Links to folders are not followed (no cycles)."""
    files = []
    for folder, names, file_names in os.walk(root):
        names[:] = [name for name in names if name not in skipped and name != "__pycache__" and name[0] != "."]
        files += [Path(folder, name) for name in file_names if name[0] != "."]
    return sorted((file for file in files if file.is_file()), key=lambda file: file.relative_to(root).as_posix())


def _list_stdlib() -> list[CorpusFile]:
    root = Path(sysconfig.get_path("stdlib"))
    files = [CorpusFile(file.relative_to(root).as_posix(), file) for file in _walk(root, _STDLIB_SKIPPED)
             if file.suffix == ".py" and not file.name.startswith("_sysconfigdata")
             and not file.relative_to(root).parts[0].startswith("config-")]
    if not files:
        raise ValueError(f"this Python has no library sources under {str(root)!r}; name a text file or folder instead")
    return files


def _read_file(file: CorpusFile) -> Iterator[Document]:
    if file.path is None:
        yield from _read_text(sys.stdin.buffer, file.name, "standard input")
        return
    with open(file.path, "rb") as stream:
        if file.field is None:
            yield from _read_text(stream, file.name, str(file.path))
        else:
            yield from _read_jsonl(stream, file, file.field)


def _read_text(stream: BinaryIO, name: str, where: str) -> Iterator[Document]:
    """A text in parts of about PART_BYTES, cut after a line end where there is one."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    rest, part, offset = "", 0, 0
    while True:
        block = stream.read(PART_BYTES)
        last = len(block) < PART_BYTES
        try:
            text = rest + decoder.decode(block, final=last)
        except UnicodeDecodeError as error:
            # The decoder may hold the first bytes of a character from the block before: they count from there.
            at = offset + len(block) - len(error.object) + error.start
            raise ValueError(f"{where} is not UTF-8 text (byte {at}: {error.reason}); convert it, or leave it out, "
                             f"for instance with a glob such as 'folder/**/*.txt'") from None
        offset += len(block)
        cut = len(text) if last else text.rfind("\n") + 1 or len(text)
        text, rest = text[:cut], text[cut:]
        if text:
            yield Document(name, text, part)
            part += 1
        if last:
            return


def _read_jsonl(stream: BinaryIO, file: CorpusFile, field: str) -> Iterator[Document]:
    for number, line in enumerate(stream, start=1):
        where = f"{file.path}:{number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:  # JSON's and UTF-8's errors both
            raise ValueError(f"{where} is not JSON ({error}); each line must be one JSON object") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where} holds a {type(row).__name__}; each line must be one JSON object")
        if field not in row:
            raise ValueError(f"{where} has no field {field!r} (it has {', '.join(map(repr, row)) or 'none'}); "
                             f"name the one with the text: {file.path}:FIELD")
        text = row[field]
        if not isinstance(text, str):
            raise ValueError(f"{where}: field {field!r} is a {type(text).__name__}; it must be a string")
        try:
            encoded = text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{where}: field {field!r} is not text ({error.reason} at character "
                             f"{error.start})") from None
        if text:
            # Named by content, not by line: a line put in between moves no other, and copies share a split.
            yield Document(f"{file.name}#{hashlib.blake2b(encoded, digest_size=8).hexdigest()}", text)


def _split_inside(file: CorpusFile, val_fraction: float) -> Iterator[tuple[Split, Document]]:
    assert file.path is not None, "standard input must be stored in a file first"
    total = file.path.stat().st_size
    cut = int((1.0 - val_fraction) * total)
    done, parts = 0, {"train": 0, "val": 0}
    split: Split = "train"
    for document in read_files([file]):
        size = len(document.text.encode())
        pieces: list[tuple[Split, str]] = [(split, document.text)]
        if split == "train" and done + size > cut:
            head, tail = _cut_at_line(document.text, cut - done, may_take_all=done + size < total)
            pieces, split = [("train", head), ("val", tail)], "val"
        for name, text in pieces:
            if text:
                yield name, Document(f"{file.name}[{name}]", text, parts[name])
                parts[name] += 1
        done += size


def _cut_at_line(text: str, num_bytes: int, *, may_take_all: bool) -> tuple[str, str]:
    """Divides after the first line end at or past that byte; where this part of the file has none, at the character."""
    at = len(text.encode()[:num_bytes].decode(errors="ignore"))
    end = text.find("\n", max(at - 1, 0)) + 1
    if end and (end < len(text) or may_take_all):
        at = end
    return text[:at], text[at:]
