"""From token ids to text as it arrives: whole characters only, stop strings found and held back while undecided.

Tokens split characters and stop strings span tokens, so a stream must sometimes wait; it waits for the least that could
still change. Both parts cost amortised O(1) per token however long the text grows. Left out: which token comes next.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol

from .backend import extension

_REPLACEMENT = "\ufffd"


class _Decodes(Protocol):
    def decode(self, ids: list[int], /) -> str: ...


class Detokenizer:
    """Turns ids into text piece by piece; the pieces together are the text of all ids.

    An id's text depends on its neighbours (a character split over tokens, a leading space that decoders drop at the
    start), so the latest ids are decoded together each time and what is new is the rest. U+FFFD at the end may be a
    character's first bytes and waits for the next id: up to 3 of them, for decoders that write one per byte. Decoders
    that read a run of bytes as all valid or all invalid take text back for a moment; then nothing is given until it is
    there again. Only the latest ids are kept, since a UTF-8 character spans at most 4.
    """

    WINDOW, CONTEXT = 16, 8

    def __init__(self, tokenizer: _Decodes) -> None:
        self._tokenizer = tokenizer
        self._reset()

    def _reset(self) -> None:
        self._ids: list[int] = []
        self._given = ""  # the part of decode(self._ids) already returned
        self._limit = self.WINDOW

    def push(self, token: int) -> str:
        """Text that is certain once `token` is there; often all of it, sometimes none."""
        self._ids.append(token)
        text, piece = self._tokenizer.decode(self._ids), ""
        if text.startswith(self._given):
            undecided = min(len(text) - len(text.rstrip(_REPLACEMENT)), 3)
            piece = text[len(self._given) : len(text) - undecided]
            self._given += piece
        if len(self._ids) >= self._limit:
            self._forget(text)
        return piece

    def flush(self) -> str:
        """What was waiting, as it stands; starts afresh."""
        piece = self._tokenizer.decode(self._ids)[len(self._given) :] if self._ids else ""
        self._reset()
        return piece

    def _forget(self, text: str) -> None:
        """Drops the oldest ids if the text of the others ends as the whole does; else tries again at twice as many."""
        kept = self._ids[-self.CONTEXT :]
        tail, waiting = self._tokenizer.decode(kept), len(text) - len(self._given)
        if not text.startswith(self._given) and not text.endswith(_REPLACEMENT):
            self._given = text[: len(self._given)]  # a decoder that rewrites what it wrote: go on from where it is
        if text.startswith(self._given) and text.endswith(tail) and len(tail) > waiting:
            self._ids, self._given, self._limit = kept, tail[: len(tail) - waiting], self.WINDOW
        else:
            self._limit *= 2


class StopMatcher(Protocol):
    """Finds stop strings in a byte stream. The stream ends at the first byte at which any stop string ends; if several
    end there, the longest is cut off. How the stream is cut into pieces makes no difference."""

    def feed(self, data: bytes, /) -> tuple[bytes, bool]:
        """Takes the next bytes; returns those certainly outside a stop string, and whether one was found. After that
        everything is swallowed until `reset`."""

    def flush(self) -> bytes:
        """The stream is over: what was held back is text after all. Starts afresh."""

    def reset(self) -> None:
        """Starts afresh, forgetting what was held back."""


class PythonStopMatcher:
    """The machine of csrc/stop_matcher.h (Aho-Corasick), for installations without the extension."""

    def __init__(self, stops: Sequence[bytes]) -> None:
        self._held, self._node, self._matched = b"", 0, False
        self._next: list[dict[int, int]] = [{}]  # node -> byte -> node; a node is a prefix of some stop string
        self._depth, self._match, self._fail = [0], [0], [0]
        for stop in stops:
            if not isinstance(stop, bytes):
                raise TypeError(f"stops holds a {type(stop).__name__}; pass bytes")
            if not stop:
                raise ValueError("stops holds an empty string, which would match everywhere; leave it out")
            node = 0
            for byte in stop:
                if byte not in self._next[node]:
                    self._next[node][byte] = len(self._next)
                    self._next.append({})
                    self._depth.append(self._depth[node] + 1)
                    self._match.append(0)
                    self._fail.append(0)
                node = self._next[node][byte]
            self._match[node] = len(stop)
        todo = deque(self._next[0].values())
        while todo:  # breadth first: the longest proper suffix of a node is shorter, so it is finished
            node = todo.popleft()
            self._match[node] = max(self._match[node], self._match[self._fail[node]])
            for byte, child in self._next[node].items():
                self._fail[child] = self._step(self._fail[node], byte)
                todo.append(child)

    def _step(self, node: int, byte: int) -> int:
        while byte not in self._next[node]:
            if node == 0:
                return 0
            node = self._fail[node]
        return self._next[node][byte]

    def feed(self, data: bytes, /) -> tuple[bytes, bool]:
        if self._matched:
            return b"", True
        for i, byte in enumerate(data):
            self._node = self._step(self._node, byte)
            if self._match[self._node]:
                self._matched = True
                text = self._held + data[: i + 1]
                self._held = b""
                return text[: len(text) - self._match[self._node]], True
        text = self._held + data
        safe = len(text) - self._depth[self._node]
        self._held = text[safe:]
        return text[:safe], False

    def flush(self) -> bytes:
        held = self._held
        self.reset()
        return held

    def reset(self) -> None:
        self._held, self._node, self._matched = b"", 0, False


def stop_matcher(stops: Sequence[str]) -> StopMatcher:
    """A matcher for these strings, the compiled one where there is one. Both behave alike."""
    compiled = extension()
    encoded = [stop.encode() for stop in stops]
    matcher: StopMatcher = compiled.StopMatcher(encoded) if compiled is not None else PythonStopMatcher(encoded)
    return matcher


class TextStream:
    """One text in the making: ids in, pieces of text out, until a stop string ends it."""

    def __init__(self, tokenizer: _Decodes, stops: Sequence[str]) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._matcher = stop_matcher(stops) if stops else None

    def push(self, token: int, may_stop: bool = True) -> tuple[str, bool]:
        """(text that is certain now, whether a stop string was found). Text that comes while `may_stop` is false is
        not searched."""
        piece = self._detokenizer.push(token)
        return self._through(piece) if may_stop else (piece, False)

    def finish(self) -> str:
        """What is left when the ids end by themselves."""
        piece, stopped = self._through(self._detokenizer.flush())
        return piece if stopped or self._matcher is None else piece + self._matcher.flush().decode()

    def _through(self, piece: str) -> tuple[str, bool]:
        if self._matcher is None:
            return piece, False
        # A held-back prefix of a stop string is made of whole characters, since only whole characters are fed.
        safe, stopped = self._matcher.feed(piece.encode())
        return safe.decode(), stopped
