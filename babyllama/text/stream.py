"""Token ids -> text as it arrives: whole characters only, and nothing of a stop string."""

import codecs
from collections.abc import Sequence

from babyllama.errors import UsageError
from babyllama.text.tokenizer import Tokenizer


class TextStream:
    """The text of a growing sequence of ids. What `push` and `flush` return, joined, is `decode` of all ids.

    A character may take several tokens, and a stop string may begin anywhere inside one: text is held back
    while it is not yet a whole character, or while it may be the beginning of a stop string, and no longer.
    The stop string that is complete first ends the text (the longest, if several are complete at the same
    character); `stopped` turns true, and every later call returns "".

    Raises UsageError E102 for an empty stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stop: str | Sequence[str] = ()) -> None:
        self._stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if "" in self._stop:
            raise UsageError(
                "E102", "stop", "an empty stop string", "leave it out, or give at least one character"
            )
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._previous: int | None = None
        self._held = ""  # no stop string is complete in it
        self.stopped = False

    def push(self, id: int) -> str:
        """The text that can be shown now that id has arrived. Raises E309 for an unknown id."""
        piece = self._tokenizer.bytes_after(self._previous, id)
        self._previous = id
        if self.stopped:
            return ""
        return self._release(self._decoder.decode(piece), last=False)

    def flush(self) -> str:
        """What was held back; half a character becomes U+FFFD. Call it when no more ids come."""
        if self.stopped:
            return ""
        return self._release(self._decoder.decode(b"", final=True), last=True)

    def _release(self, new: str, last: bool) -> str:
        text = self._held + new
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)[1]]
        held = 0 if last else max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Characters of the longest end of text that is a beginning of stop, but not all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
