"""Converts tokens to text while they are generated. It returns only whole characters, and ends at a stop sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

FinishReason = Literal["stop", "length"]

#: The replacement character, which a decoder returns for invalid bytes and for an incomplete character.
_BROKEN = "\ufffd"
#: Maximum number of replacement characters for one incomplete character. A UTF-8 character has up to four bytes; if the
#: last byte is missing, some decoders return one replacement character for each of the other three.
_MAX_PENDING = 3
#: Tokens. Each new token is decoded together with the tokens of a window. When the window has this length, it is
#: shortened, so that the cost per token is bounded.
_WINDOW = 48
#: Tokens that stay in a shortened window as context for the decoder (SentencePiece drops a leading space).
_CONTEXT = 6


class AnswerText:
    """Decodes the text of one answer while it is generated."""

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        *,
        end_tokens: frozenset[int],
        stop: tuple[str, ...],
        max_tokens: int,
    ) -> None:
        self.tokens: list[int] = []
        """All generated tokens, including the end token."""
        self.finish_reason: FinishReason | None = None
        self._decode = decode
        self._end_tokens = end_tokens
        self._stop = stop
        self.max_tokens = max_tokens
        """The answer ends when it has this many tokens."""
        self._start = 0  # index of the window's first token in `tokens`
        self._taken = 0  # characters of the window that were returned already or are in `_held`
        self._held = ""  # text that may be the start of a stop sequence

    def push(self, token: int) -> str:
        """Add the next token and return the text that is now certain, which is often empty.

        Sets `finish_reason` at the end of the answer.
        """
        self.tokens.append(token)
        if token in self._end_tokens:
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.max_tokens:
            self.finish_reason = "length"
        text = self._held + self._new_text()
        cut = min((at for stop in self._stop if (at := text.find(stop)) >= 0), default=-1)
        if cut >= 0:
            self.finish_reason = "stop"
            return text[:cut]
        keep = 0 if self.finish_reason else max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _new_text(self) -> str:
        """Return the new text of the window, without an incomplete character at its end."""
        window = self.tokens[self._start :]
        text = self._decode(window)
        ended = self.finish_reason is not None
        pending = 0 if ended else min(_MAX_PENDING, len(text) - len(text.rstrip(_BROKEN)))
        certain = len(text) - pending
        new = text[self._taken : certain]
        self._taken = max(self._taken, certain)
        if len(window) >= _WINDOW and pending == 0:
            self._start = len(self.tokens) - _CONTEXT
            self._taken = len(self._decode(self.tokens[self._start :]))
        return new


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of `text` that is a prefix of `stop`, but not the whole `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
