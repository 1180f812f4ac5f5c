"""A conversation in the terminal: what a person types, what the model answers, what was said so far.

In a terminal there are commands, counts, and a line that can be edited. In a pipe every line is a message, and answers
are all that comes out.
"""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from babyllama.checkpoint.folder import replace_file
from babyllama.errors import BabyLlamaError, InputError, MachineError
from babyllama.terminal import console, errors, note, plural, printable, show_error

PROMPT = "> "
HELP = """/reset      forget what was said
/save FILE  write what was said, as data sets of conversations have it: JSON
/help       this
/quit       leave; so do Ctrl-D, and Ctrl-C twice

Ctrl-C while the model answers stops the answer. To send a message that begins
with /, put a space before it."""
PLAIN = "This model has no chat template: it has not learned to answer, and goes on with what you write."


def talk(
    llama: Any, *, write: Callable[..., None], name: str, system: str | None = None, **options: Any
) -> None:
    """Talk until the person leaves. `write` shows text of the model; `options` are those of LoadedLlama.chat.

    Raises KeyboardInterrupt when Ctrl-C is pressed twice at the prompt, or once in a pipe. Errors end a conversation
    in a pipe; in a terminal they are shown, the message that caused one is forgotten, and the conversation goes on.
    """
    conversation = Conversation(llama, write, system, options)
    plain = llama.chat_template.plain  # and if the template cannot be used, that is said now
    if sys.stdin.isatty() and sys.stdout.isatty():
        note(f"{name}, context {llama.config.max_seq_len:,} tokens. /help lists commands, Ctrl-D leaves.")
        if plain:
            note(PLAIN)
        _in_a_terminal(conversation)
    else:
        if plain:
            errors.print(PLAIN, markup=False, soft_wrap=True)
        for message in _lines(sys.stdin.buffer):
            conversation.turn(message)
            if conversation.stopped:
                raise KeyboardInterrupt


class Conversation:
    """What was said so far, and the model that goes on with it.

    messages  for LoadedLlama.chat; an answer that was stopped is marked: "stopped": true.
    stopped   whether Ctrl-C stopped the last answer.
    """

    def __init__(
        self, llama: Any, write: Callable[..., None], system: str | None, options: dict[str, Any]
    ) -> None:
        self.llama, self.write, self.options = llama, write, options
        self.system = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, Any]] = [*self.system]
        self.left_out, self.stopped = 0, False
        self.saved: set[Path] = set()

    def turn(self, message: str) -> str:
        """Show the answer to a message as it comes, and remember both. Gives the counts, as a line to show.

        Ctrl-C stops the answer, which is kept as far as it went. Nothing is remembered of a turn that fails.
        """
        self.messages.append({"role": "user", "content": message})
        said: list[str] = []
        answer, self.stopped, began = None, False, time.perf_counter()
        try:
            answer = self.llama.chat(self.messages, **self.options)
            for piece in _trimmed(_kept(answer, said)):
                self.write(piece, end="")
        except KeyboardInterrupt:
            self.stopped = True
        except BaseException:
            self.messages.pop()
            raise
        seconds = time.perf_counter() - began
        self.write("", end="\n")
        if self.stopped and not said:
            self.messages.pop()
            return "Stopped before the first word; your message is forgotten."
        marks = {"stopped": True} if self.stopped else {}
        self.messages.append({"role": "assistant", "content": "".join(said), **marks})
        assert answer is not None
        return self._counts(answer, seconds)

    def _counts(self, answer: Any, seconds: float) -> str:
        used, context = answer.prompt_tokens + answer.tokens, self.llama.config.max_seq_len
        parts = [
            f"{plural(answer.tokens, 'token')} in {seconds:.1f} s, {answer.tokens / max(seconds, 1e-9):.1f} a second",
            f"context {used:,} of {context:,}",
        ]
        if self.stopped:
            parts.append("stopped")
        elif not answer.ended:
            parts.append("cut: the context is full" if used >= context else "cut at --max-tokens")
        lines = [" · ".join(parts)]
        if answer.left_out > self.left_out:
            few = answer.left_out == 1
            lines.append(
                f"The oldest {'message has' if few else f'{answer.left_out:,} messages have'} no room in the context, "
                "and the model does not see them any more."
            )
        self.left_out = answer.left_out
        return "\n".join(lines)

    def reset(self) -> None:
        """Forget what was said; a system message stays."""
        self.messages, self.left_out = [*self.system], 0

    def save(self, path: Path) -> None:
        """Write what was said, whole or not at all. Raises MachineError E401, or E403 (also for a file of others)."""
        line = json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n"
        try:
            taken = path.exists() and path.resolve() not in self.saved
            if not taken:
                replace_file(path, line.encode())
        except (OSError, ValueError) as error:  # a name that is too long, or has a zero byte in it
            raise MachineError("E403", str(path), str(error), "choose another name") from None
        if taken:
            found = "is there already, and is not from this conversation"
            raise MachineError("E403", str(path), found, "choose another name, or remove it first")
        self.saved.add(path.resolve())


def _in_a_terminal(conversation: Conversation) -> None:
    with contextlib.suppress(ImportError):  # Windows has none, and edits lines by itself
        import readline  # noqa: F401  (input() edits lines and remembers them when it is loaded)
    interrupted = False
    while True:
        try:
            line = input(PROMPT)
            interrupted = False
            if line.startswith("/"):
                if not _obey(line, conversation):
                    return
            elif line.strip():
                console.print(printable(conversation.turn(line.strip())), style="dim", markup=False)
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            if interrupted:
                raise
            interrupted = True
            note("\nCtrl-C once more leaves.")
        except UnicodeDecodeError:
            note("That was not valid text, and was not sent.")
        except BabyLlamaError as error:
            show_error(error)


def _obey(line: str, conversation: Conversation) -> bool:
    """Do what a command says; False when it is to leave."""
    command, _, rest = line.strip().partition(" ")
    if command == "/quit":
        return False
    if command == "/help":
        note(HELP)
    elif command == "/reset":
        conversation.reset()
        note("Forgotten.")
    elif command == "/save" and rest.strip():
        path = Path(rest.strip())
        with contextlib.suppress(RuntimeError):  # ~NAME of nobody here: a name like any other
            path = path.expanduser()
        conversation.save(path)
        note(f"Saved {plural(len(conversation.messages), 'message')} in {path}.")
    elif command == "/save":
        note("Name a file:  /save conversation.jsonl")
    else:
        note(f"{command} is no command; /help lists them. To send it as a message, put a space before it.")
    return True


def _lines(file: Iterable[bytes]) -> Iterator[str]:
    """The lines of a pipe that hold something, in UTF-8, whatever their line ends. Raises InputError E302."""
    for number, line in enumerate(file, 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            found = f"byte {error.start} of line {number} is not valid in utf-8"
            raise InputError("E302", "the messages", found, "save them as utf-8") from None
        if text:
            yield text


def _kept(pieces: Iterable[str], said: list[str]) -> Iterator[str]:
    for piece in pieces:
        said.append(piece)
        yield piece


def _trimmed(pieces: Iterable[str]) -> Iterator[str]:
    """The same text without white space at its ends, as soon as it is known not to be an end."""
    begun, held = False, ""
    for piece in pieces:
        text = held + piece if begun else piece.lstrip()
        begun = begun or bool(text)
        shown = text.rstrip()
        held = text[len(shown) :]
        if shown:
            yield shown
