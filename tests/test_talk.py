"""A conversation in the terminal and through a pipe: what is said, kept, stopped and saved."""

import contextlib
import errno
import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from babyllama import talk
from babyllama.checkpoint import folder
from babyllama.checkpoint.hf import model_files
from babyllama.errors import InputError, MachineError
from babyllama.model import Config, Llama
from babyllama.talk import Conversation
from babyllama.terminal import say
from babyllama.text.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


class Said:
    """A model that says what it is given to say; an exception in it is raised there."""

    def __init__(self, *answers: Any, left_out: int = 0, ended: bool = True) -> None:
        self.answers, self.asked = list(answers), list[Any]()
        self.config, self.chat_template = SimpleNamespace(max_seq_len=100), SimpleNamespace(plain=False)
        self.left_out, self.ended = left_out, ended

    def chat(self, messages: Any, **options: Any) -> Any:
        self.asked.append([{key: one[key] for key in ("role", "content")} for one in messages])
        pieces = self.answers.pop(0)

        class Answer(Iterator[str]):
            prompt_tokens, tokens, left_out, ended = 10, 0, self.left_out, self.ended

            def __next__(self) -> str:
                if self.tokens == len(pieces):
                    raise StopIteration
                piece = pieces[self.tokens]
                self.tokens += 1
                if isinstance(piece, BaseException):
                    raise piece
                return piece

        return Answer()


def conversation(model: Said, system: str | None = None) -> Conversation:
    return Conversation(model, say, system, {})


@pytest.fixture(scope="module")
def chatty(tmp_path_factory) -> Path:
    """The folder of a small model that was never trained, with a chat template."""
    tokenizer = Tokenizer.train(["The king said hello to the queen. "] * 9, 280, exact=False)
    tokenizer = Tokenizer({**tokenizer.files(), "chat_template.jinja": TEMPLATE.encode()})
    sizes = {"dim": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 2, "head_dim": 8, "hidden_dim": 24}
    config = Config(**sizes, vocab_size=tokenizer.vocab_size, max_seq_len=8192)
    path = tmp_path_factory.mktemp("chatty")
    for name, data in model_files(config, Llama(config, seed=1).state_dict(), tokenizer).items():
        (path / name).write_bytes(data)
    return path


# ---- turns ---------------------------------------------------------------------------------------


def test_the_model_is_shown_all_that_was_said(capsys):
    model = Said(["Hel", "lo."], ["Fine"])
    talking = conversation(model, system="Be kind")
    talking.turn("Hi")
    talking.turn("How are you?")
    said = [("system", "Be kind"), ("user", "Hi"), ("assistant", "Hello."), ("user", "How are you?")]
    assert [(one["role"], one["content"]) for one in model.asked[1]] == said
    assert capsys.readouterr().out == "Hello.\nFine\n"
    talking.reset()
    assert talking.messages == [{"role": "system", "content": "Be kind"}]


def test_white_space_at_the_ends_of_an_answer_is_kept_and_not_shown(capsys):
    talking = conversation(Said([" \n", " a", " \n", "\n", "b\n", " ", "\n"]))
    talking.turn("Hi")
    assert talking.messages[-1]["content"] == " \n a \n\nb\n \n"
    assert capsys.readouterr().out == "a \n\nb\n"


def test_what_a_model_says_cannot_move_the_cursor(capsys):
    conversation(Said(["a\x1b[2Jb"])).turn("Hi")
    assert capsys.readouterr().out == "a␛[2Jb\n"


def test_the_counts_say_tokens_time_and_context(capsys):
    counts = conversation(Said(["a", "b", "c"])).turn("Hi")
    assert re.fullmatch(r"3 tokens in \d\.\d s, [\d.]+ a second · context 13 of 100", counts)
    assert "cut at --max-tokens" in conversation(Said(["a"], ended=False)).turn("Hi")
    assert "the context is full" in conversation(Said(["a"] * 90, ended=False)).turn("Hi")


def test_messages_without_room_are_told_once():
    talking = conversation(Said(["a"], ["b"], left_out=2))
    assert "oldest 2 messages have no room" in talking.turn("Hi")
    assert "no room" not in talking.turn("Hi")


def test_ctrl_c_keeps_the_answer_as_far_as_it_went(capsys):
    model = Said(["One", " two", KeyboardInterrupt()], ["three"])
    talking = conversation(model)
    assert talking.turn("Count").endswith("stopped")
    assert talking.messages[-1] == {"role": "assistant", "content": "One two", "stopped": True}
    talking.turn("Go on")
    assert model.asked[1][1] == {"role": "assistant", "content": "One two"}
    assert capsys.readouterr().out == "One two\nthree\n"


def test_ctrl_c_before_the_first_word_forgets_the_message(capsys):
    talking = conversation(Said([KeyboardInterrupt()]))
    assert "forgotten" in talking.turn("Hi") and talking.messages == []


@pytest.mark.parametrize("place", [0, 1])
def test_a_turn_that_fails_is_not_remembered(place, capsys):
    error = InputError("E311", "the last message", "too long", "shorten it")
    talking = conversation(Said([*["a", "b"][:place], error], ["fine"]))
    with pytest.raises(InputError):
        talking.turn("Hi")
    assert talking.messages == []
    talking.turn("Hi")
    assert len(talking.messages) == 2


# ---- saving --------------------------------------------------------------------------------------


def test_what_was_said_is_saved_as_a_line_of_json(tmp_path):
    talking = conversation(Said(["Größe\n", " 👩‍👩‍👧"], ["x", KeyboardInterrupt()]), system="Be kind")
    talking.turn("日本")
    talking.turn("more")
    talking.save(tmp_path / "said.jsonl")
    data = (tmp_path / "said.jsonl").read_bytes()
    assert data.count(b"\n") == 1 and data.endswith(b"\n")
    assert json.loads(data)["messages"] == talking.messages and len(talking.messages) == 5
    assert "Größe" in data.decode() and talking.messages[-1]["stopped"]
    talking.reset()
    talking.save(tmp_path / "said.jsonl")
    assert len(json.loads((tmp_path / "said.jsonl").read_bytes())["messages"]) == 1, (
        "its own file it replaces"
    )


@pytest.mark.parametrize("name", ["taken.txt", "taken.txt/below.json", ".", "x" * 300, "a\0b", "/dev/full"])
def test_a_place_that_cannot_be_saved_to_is_e403_and_nothing_is_lost(tmp_path, name):
    (tmp_path / "taken.txt").write_text("mine", encoding="utf-8")
    talking = conversation(Said(["a"]))
    talking.turn("Hi")
    with pytest.raises(MachineError) as caught:
        talking.save(tmp_path / name)
    assert caught.value.code == "E403" and len(talking.messages) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["taken.txt"]
    assert (tmp_path / "taken.txt").read_text(encoding="utf-8") == "mine"


def test_a_full_disk_is_e401_and_the_old_file_stays(tmp_path, monkeypatch):
    talking = conversation(Said(["a"], ["b"]))
    talking.turn("Hi")
    path = tmp_path / "said.jsonl"
    talking.save(path)
    before = path.read_bytes()
    talking.turn("more")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(folder.os, "fsync", full)
    with pytest.raises(MachineError) as caught:
        talking.save(path)
    assert caught.value.code == "E401" and path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["said.jsonl"]


# ---- through a pipe ------------------------------------------------------------------------------


@pytest.fixture
def piped(monkeypatch, capsys):
    """piped(bytes, model): what comes out when these bytes come in."""

    def run(data: bytes, model: Said, **options: Any) -> str:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="ascii"))
        talk.talk(model, write=say, name="model", **options)
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_in_a_pipe_every_line_is_a_message_and_only_answers_come_out(piped, end):
    model = Said(["one"], ["two"], ["three"])
    lines = ["\ufeffFirst".encode(), b"", b"  ", b"/reset", "größer".encode()]
    assert piped(end.join(lines), model) == "one\ntwo\nthree\n"
    assert [one["content"] for one in model.asked[-1][::2]] == ["First", "/reset", "größer"]


def test_bytes_in_a_pipe_that_are_no_text_are_e302_naming_the_line(piped):
    with pytest.raises(InputError, match="line 2") as caught:
        piped(b"Hello\n\xff\xfe\n", Said(["fine"]))
    assert caught.value.code == "E302"


def test_ctrl_c_in_a_pipe_ends_the_program(piped):
    model = Said(["x", KeyboardInterrupt()], ["y"])
    with pytest.raises(KeyboardInterrupt):
        piped(b"a\nb\n", model)
    assert len(model.asked) == 1


def program(*arguments: object, **options: Any) -> subprocess.Popen[Any]:
    command = [sys.executable, "-m", "babyllama", "chat", *map(str, arguments)]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, **options)


def test_the_answers_of_a_pipe_are_those_of_the_api(chatty):
    process = program(chatty, "--max-tokens", 12, "--seed", 3, "--system", "Be brief",
                      stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    shown, complaints = process.communicate(b"Hello\r\nAnd more\r\n", timeout=120)
    assert process.returncode == 0 and complaints == b""
    from babyllama import load

    llama, messages = load(chatty), [{"role": "system", "content": "Be brief"}]
    expected = io.StringIO()
    for text in ("Hello", "And more"):
        messages.append({"role": "user", "content": text})
        messages.append(
            {"role": "assistant", "content": "".join(llama.chat(messages, max_tokens=12, seed=3))}
        )
        with contextlib.redirect_stdout(expected):
            print(talk.printable(messages[-1]["content"].strip()))
    assert shown.decode() == expected.getvalue()
    llama.chat_template.close()


# ---- in a terminal -------------------------------------------------------------------------------


class Terminal:
    """`babyllama chat` in a pseudo-terminal: what is typed, what is seen."""

    def __init__(self, *arguments: object, cwd: Path) -> None:
        self.ours, theirs = os.openpty()
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "TERM": "dumb",
            "COLUMNS": "100",
            "INPUTRC": "/dev/null",
        }
        command = [sys.executable, "-m", "babyllama", "chat", *map(str, arguments)]
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, cwd=cwd, start_new_session=True,
            preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(theirs)
        self.seen, self.read = "", 0

    def type(self, text: str) -> None:
        os.write(self.ours, text.encode())

    def until(self, text: str, seconds: float = 60, again: str = "") -> str:
        """What is seen from where the last call ended, up to and with `text`.

        again  typed every second after five of silence: Python may notice a Ctrl-C that comes just before it begins to
               wait for a key only with the next one.
        """
        deadline = time.monotonic() + seconds
        while (at := self.seen.find(text, self.read)) < 0:
            assert time.monotonic() < deadline, self.seen
            if not select.select([self.ours], [], [], 1)[0]:
                if again and time.monotonic() > deadline - seconds + 5:
                    self.type(again)
                continue
            try:
                piece = os.read(self.ours, 65536)
            except OSError:  # Linux says so when the other side is closed
                piece = b""
            assert piece, f"it has ended: {self.seen}"
            self.seen += piece.decode(errors="replace").replace("\r\n", "\n")
        part = self.seen[self.read : at + len(text)]
        self.read = at + len(text)
        return part

    def ends(self, seconds: float = 60, again: str = "") -> int:
        """The exit status; `again` as in `until`."""
        with contextlib.suppress(OSError):  # Linux says so when the other side is closed
            while True:
                if not select.select([self.ours], [], [], 5)[0]:
                    self.type(again)
                elif piece := os.read(self.ours, 65536):
                    self.seen += piece.decode(errors="replace").replace("\r\n", "\n")
                else:
                    break
        return self.process.wait(seconds)


@pytest.fixture
def terminal(chatty, tmp_path) -> Iterator[Any]:
    if not hasattr(os, "openpty"):
        pytest.skip("no pseudo-terminals here")
    opened: list[Terminal] = []

    def start(*arguments: object) -> Terminal:
        opened.append(Terminal(chatty, *arguments, cwd=tmp_path))
        return opened[-1]

    yield start
    for each in opened:
        each.process.kill()
        each.process.wait()
        os.close(each.ours)


def test_a_conversation_in_a_terminal(terminal, tmp_path):
    screen = terminal("--max-tokens", 8, "--system", "Be brief")
    assert "context 8,192 tokens" in screen.until("> ")
    screen.type("Hello\n")
    assert re.search(
        r"8 tokens in .* a second · context \d+ of 8,192 · cut at --max-tokens", screen.until("\n> ")
    )
    screen.type("\n   \n/help\n")
    assert "/save FILE" in screen.until("\n> ") + screen.until("put a space before it.")
    screen.type("/save said.jsonl\n")
    screen.until("Saved 3 messages in said.jsonl.")
    screen.type("/wizardry\n")
    screen.until("/wizardry is no command")
    screen.type("/save\n")
    screen.until("Name a file")
    screen.type("/save nowhere\x01\x0b/save said.jsonl/x\n")  # Ctrl-A and Ctrl-K: the line can be edited
    screen.until("error[E403]")
    screen.type("/reset\n")
    screen.until("Forgotten.")
    screen.type("/save empty.jsonl\n")
    screen.until("Saved 1 message in empty.jsonl.")
    screen.type(" /no command\n")
    screen.until("8 tokens")
    screen.type("/quit\n")
    assert screen.ends() == 0
    roles = [one["role"] for one in json.loads((tmp_path / "said.jsonl").read_bytes())["messages"]]
    assert roles == ["system", "user", "assistant"] and not (tmp_path / "nowhere").exists()


def test_ctrl_c_stops_the_answer_alone_and_twice_at_the_prompt_leaves(terminal, tmp_path):
    screen = terminal("--max-tokens", 8000, "--temperature", 1.5)
    screen.until("> ")
    screen.type("Hello\n")
    screen.until("Hello\n")
    while len(screen.seen) - screen.read < 40:
        screen.seen += os.read(screen.ours, 4096).decode(errors="replace").replace("\r\n", "\n")
    os.write(screen.ours, b"\x03")
    assert "stopped" in screen.until("\n> ")
    screen.type("/save said.jsonl\n")
    screen.until("Saved 2 messages")
    assert json.loads((tmp_path / "said.jsonl").read_bytes())["messages"][-1]["stopped"] is True
    screen.until("> ")
    screen.type("\x03")
    screen.until("once more leaves", again="\x03")
    screen.until("> ")
    screen.type("/help\n")
    screen.until("put a space before it.")
    screen.until("> ")
    for press in range(2):
        assert screen.process.poll() is None, press
        screen.type("\x03")
        if press == 0:
            screen.until("once more leaves", again="\x03")
            screen.until("> ")
    assert screen.ends(again="\x03") == 128 + signal.SIGINT
    assert "Traceback" not in screen.seen and "error" not in screen.seen


def test_ctrl_d_leaves(terminal):
    screen = terminal()
    screen.until("> ")
    screen.type("\x04")
    assert screen.ends() == 0


def test_a_conversation_longer_than_the_context_goes_on_and_says_what_is_left_out(terminal):
    screen = terminal("--max-tokens", 4)
    screen.until("> ")
    for _ in range(3):  # a terminal takes 4,096 characters a line, the model 8,192 tokens
        screen.type("zq9 " * 1000 + "\n")
        screen.until("\n> ")
    assert "no room in the context" in screen.seen and "error" not in screen.seen
    screen.type("/quit\n")
    assert screen.ends() == 0


def test_a_model_without_a_template_says_that_it_has_not_learned_to_answer(monkeypatch, capsys):
    model = Said()
    model.chat_template.plain = True
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b""), encoding="utf-8"))
    talk.talk(model, write=say, name="model")
    shown = capsys.readouterr()
    assert shown.out == "" and "has not learned to answer" in shown.err
