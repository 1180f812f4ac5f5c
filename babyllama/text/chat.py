"""Conversations -> ids, and which ids the assistant wrote.

messages ─ template, in a process of its own ─► text with marks ─ encode ─► ids
              (sandbox.py)                      a mark is a control token

The template is the model's own. Only what it writes itself can become a control token: before it runs, the names of
control tokens in it are replaced by marks, which nobody can type (`Tokenizer.marks`). What a person wrote passes
through as it is, may be trimmed, searched and cut by the template, and is ordinary text in the end, even if it looks
like <|eot_id|>. Text of the template and of a person that touch are encoded together, as other programs do.
"""

import contextlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from babyllama.errors import InputError, UsageError
from babyllama.text.tokenizer import Tokenizer, valid

Messages = Any  # a list of {"role": ..., "content": ...}; from people and files, so it is checked

ROLES = ("system", "user", "assistant")
LARGEST_TEMPLATE = 64 * 2**10  # characters; those of the Llama family have up to 4,000
LARGEST_CHAT = 2**20  # characters of all messages
SECONDS = 2.0  # for a question to the process that renders; it takes less than a millisecond
SECONDS_TO_START = 20.0  # of that process, about 0.1 on an idle machine
LONGEST_ANSWER = 64 * 2**20  # bytes, more than sandbox.py ever says
# Of the environment, what Python itself may need to start; the rest is nobody's business there.
KEPT_VARIABLES = ("TZ", "SYSTEMROOT", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")

PROBE = "qxjzk"  # an answer that no template writes by itself
PUT_ANOTHER = "put a template that works beside the tokenizer, as chat_template.jinja, or use another model"

# For a model without a template, which continues text: an answer goes on where the message ends, and all else is a
# paragraph of its own.
PLAIN = (
    "{% for message in messages %}"
    "{% if not loop.first and (message.role, loop.previtem.role) != ('assistant', 'user') %}{{ '\\n\\n' }}{% endif %}"
    "{{ message.content }}"
    "{% endfor %}"
)


class ChatTemplate:
    """How a model is talked to: the template that came with its tokenizer, or plain text where none did.

    plain     there is no template: the model continues text, and nobody taught it to answer.
    stop_ids  an answer ends at any of these: the tokenizer's `eos_ids`, and the control token that the template puts
              behind an answer.

    The process that renders starts with the first question, about 0.1 s, and stays until `close` or the end: a turn
    of a chat costs it less than a millisecond, and a set of conversations to learn from as much for each.

    Raises InputError E312 when the template cannot be used: too large, not jinja, without end in time or memory.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.plain = tokenizer.chat_template is None
        template = PLAIN if tokenizer.chat_template is None else tokenizer.chat_template
        if len(template) > LARGEST_TEMPLATE:
            _unusable(f"has {len(template):,} characters, expected at most {LARGEST_TEMPLATE:,}")
        named = dict(tokenizer.named_tokens)
        special = {name: id for id, name in tokenizer.special_names.items()}
        for name, id in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id)):
            if name not in named and id in tokenizer.special_names:
                named[name] = tokenizer.special_names[id]
        written = {text: id for text, id in special.items() if text in template or text in named.values()}
        marks = tokenizer.marks(written.values())
        self._id_of = {mark: id for id, mark in marks.items()}
        self._marks = re.compile("|".join(map(re.escape, self._id_of)) or "(?!)")
        by_name = {text: marks[id] for text, id in written.items()}
        variables = {name: by_name.get(text, text) for name, text in named.items()}
        self._renderer = _Renderer(template, by_name, variables)
        self.stop_ids = tokenizer.eos_ids | (frozenset() if self.plain else self._look_at_an_answer(special))

    def prompt(self, messages: Messages) -> list[int]:
        """The ids to which the model adds its answer: one BOS (where the model wants one), the messages, and what
        the template writes before an answer.

        Raises UsageError E101 (an unknown role), E102 (no message, or one that is not text), InputError E302 (not
        valid text), E311 (far too long), E312 (the template refuses the conversation, or does not end).
        """
        (text,) = self._renderer.texts([(_checked(messages), True)])
        return self._encode(text)[0]

    def fit(self, messages: Messages, room: int) -> tuple[list[int], int]:
        """`prompt` of as many of the last messages as `room` tokens hold, and how many older ones were left out.

        What is kept begins with a message of the user; a system message at the beginning is always kept, and counts.
        When not even the last message of the user and what follows it fit, the ids are longer than `room`.
        """
        messages = _checked(messages)
        first = 1 if messages[0]["role"] == "system" else 0
        later = [at for at in range(first + 1, len(messages)) if messages[at]["role"] == "user"]
        cuts = [first, *later]

        def from_cut(cut: int) -> list[int]:
            return self.prompt([*messages[:first], *messages[cuts[cut] :]])

        ids = from_cut(0)
        if len(ids) <= room or not later:
            return ids, 0
        too_long, fits = 0, len(cuts) - 1  # the last one is taken whether it fits or not
        while fits - too_long > 1:
            middle = (too_long + fits) // 2
            if len(from_cut(middle)) <= room:
                fits = middle
            else:
                too_long = middle
        return from_cut(fits), cuts[fits] - first

    def encode(self, messages: Messages) -> tuple[list[int], list[bool]]:
        """The ids of a whole conversation, and of each whether the assistant wrote it: to learn from.

        Its own are the text of its answers and the control token that ends each; not what the template writes before
        an answer, nor a line end behind it.

        Raises what `prompt` does; E312 also when the template writes earlier answers otherwise than the last
        one, or not behind what it prompts with, so that it cannot be told where they stand.
        """
        messages = _checked(messages)
        (text,) = self._renderer.texts([(messages, False)])
        spans = []
        for at, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, until = self._renderer.texts([(messages[:at], True), (messages[: at + 1], False)])
            if not (until.startswith(before) and text.startswith(until)):
                _unusable(
                    "writes an answer otherwise than it asks for it, or when more follows: it hides who wrote what",
                    "train on conversations that end with their only answer",
                )
            ends = [
                found.end() for found in self._marks.finditer(until, len(before)) if self._stops(found[0])
            ]
            spans.append((len(before), ends[-1] if ends else len(until)))
        ids, places = self._encode(text)
        return ids, [any(start <= a < b <= end for start, end in spans) for a, b in places]

    def close(self) -> None:
        """End the process that renders. It starts again when it is needed."""
        self._renderer.close()

    # ---- inside

    def _encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        ids, places = self._tokenizer.encode_marked(text)
        # Some templates leave BOS to the program, which puts one before every text: Zephyr's, for one.
        if not ids or (self._tokenizer.puts_bos and ids[:1] != [self._tokenizer.bos_id]):
            return [self._tokenizer.bos_id, *ids], [(0, 0), *places]
        return ids, places

    def _stops(self, mark: str) -> bool:
        return self._id_of[mark] in self.stop_ids

    def _look_at_an_answer(self, names: Iterable[str]) -> frozenset[int]:
        """The control token that the template puts behind an answer, if it does.

        Raises E312 when the name of a control token comes out as ordinary text: the template has put it together from
        pieces, as "<|" + role + "|>", and then it cannot be told from what a person might have typed.
        """
        user, answer = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": PROBE}
        try:
            (text,) = self._renderer.texts([([user, answer], False)])
        except _RefusedError:  # it wants another conversation, perhaps one with a system message
            return frozenset()
        plain = self._marks.sub("\0", text)
        for name in names:
            if len(name) > 2 and name in plain:
                _unusable(f"puts the control token {name} together from pieces")
        end = self._marks.match(text.rpartition(PROBE)[2].lstrip())
        return frozenset() if end is None or PROBE not in text else frozenset({self._id_of[end[0]]})


def _checked(messages: Messages) -> list[dict[str, str]]:
    """The roles and contents alone. Raises E101, E102, E302, E311."""
    if isinstance(messages, str | Mapping) or len(messages) == 0:
        fix = 'give a list of at least one:  [{"role": "user", "content": "Hello"}]'
        raise UsageError("E102", "messages", "not a list of messages, or an empty one", fix)
    checked = []
    for number, message in enumerate(messages):
        where = f"message {number}"
        role, content = (
            message.get(key) if isinstance(message, Mapping) else None for key in ("role", "content")
        )
        if role not in ROLES:
            raise UsageError(
                "E101", where, f"role {role!r} is not one of {', '.join(ROLES)}", "give one of these"
            )
        if not isinstance(content, str):
            found = f"its content is of type {type(content).__name__}, expected text"
            raise UsageError("E102", where, found, "give the content as one text")
        checked.append({"role": role, "content": valid(content)})
    length = sum(len(message["content"]) for message in checked)
    if length > LARGEST_CHAT:
        found = f"has {length:,} characters, at most {LARGEST_CHAT:,} are taken"
        raise InputError("E311", "the conversation", found, "shorten it, or begin a new one")
    return checked


def _unusable(found: str, fix: str = "") -> NoReturn:
    raise InputError("E312", "the chat template", found, fix or PUT_ANOTHER)


# ---- the process that renders --------------------------------------------------------------------


class _RefusedError(InputError):
    """The template itself does not want this conversation."""


class _Renderer:
    """sandbox.py as a child: started when it is needed, killed when it does not answer in time."""

    def __init__(self, template: str, marks: Mapping[str, str], variables: Mapping[str, str]) -> None:
        self._setup = {"template": template, "marks": marks, "variables": variables}
        self._process: subprocess.Popen[bytes] | None = None
        self._end: Callable[[], object] = lambda: None

    def texts(self, conversations: Sequence[tuple[Sequence[Mapping[str, str]], bool]]) -> list[str]:
        """Each conversation as text; with True, also what the template writes before an answer. Raises E312."""
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._start()
        return self._ask({"conversations": conversations}, SECONDS)["texts"]

    def close(self) -> None:
        self._end()
        self._process = None

    def _start(self) -> None:
        homes = [importlib.util.find_spec(name) for name in ("jinja2", "markupsafe")]
        paths = sorted({str(Path(home.origin).parents[1]) for home in homes if home and home.origin})
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(__file__).with_name("sandbox.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ},
            start_new_session=True,  # or Ctrl-C, which is meant for us, would end it too
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),  # the same on Windows
        )
        self._end = weakref.finalize(self, _end, self._process)
        self._ask(paths, SECONDS_TO_START)
        self._ask(self._setup, SECONDS)

    def _ask(self, question: object, seconds: float) -> dict[str, Any]:
        assert (
            self._process is not None and self._process.stdin is not None and self._process.stdout is not None
        )
        late = threading.Event()

        def stop(process: subprocess.Popen[bytes] = self._process) -> None:
            late.set()
            process.kill()

        clock = threading.Timer(seconds, stop)
        clock.daemon = True
        line = b""
        try:
            clock.start()
            with contextlib.suppress(OSError):  # it is gone, and the line is empty
                self._process.stdin.write(json.dumps(question).encode() + b"\n")
                self._process.stdin.flush()
                line = self._process.stdout.readline(LONGEST_ANSWER)
        except BaseException:  # Ctrl-C: half a question is asked, and no later one could be
            self.close()
            raise
        finally:
            clock.cancel()
        if not line.endswith(b"\n"):
            self.close()
            _unusable(
                f"did not end within {seconds:g} seconds"
                if late.is_set()
                else "ended the process that renders it"
            )
        answer: dict[str, Any] = json.loads(line)
        if answer.get("refused"):
            fix = "change the messages so that it takes them; some want no system message, or turns that alternate"
            raise _RefusedError(
                "E312", "the chat template", f"refuses this conversation: {answer['problem']}", fix
            )
        if "problem" in answer:
            self.close()
            _unusable(answer["problem"])
        return answer


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # what was not yet written goes nowhere
                pipe.close()
