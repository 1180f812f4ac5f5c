"""The command line: each verb does what it says, on any terminal, and a signal never costs more than a step."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import typer
from rich.console import Console

from babyllama import api, cli, machine, terminal
from babyllama.checkpoint.run import Run
from babyllama.cli import app, main
from babyllama.data import library
from babyllama.data.corpus import Corpus
from babyllama.data.documents import Document, Reading, read_file
from babyllama.data.questions import Question
from babyllama.errors import BabyLlamaError
from babyllama.generate.engine import Completion
from babyllama.generate.sample import STRATEGIES
from babyllama.terminal import TrainingScreen, command, printable
from babyllama.text.tokenizer import Tokenizer
from babyllama.train import loop
from babyllama.train.loop import Started, Stepped

ROOT = Path(__file__).parents[1]
TALE = "There was once a king who had three sons, and the youngest was called Simpleton. "
FAST = ["--size", "100k", "--device", "cpu"]
for setting in ("context=32", "batch_size=4", "threads=1", "evaluations=2", "precision=float32"):
    FAST += ["--set", setting]
VERBS = [command.callback.__name__ for command in app.registered_commands]


@pytest.fixture(scope="module")
def book(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text("".join(f"{i}. {TALE}\n\n" for i in range(200)), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TERMINAL_WIDTH"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def said(capsys):
    """Run the command line and return what stands on stdout: said(*arguments, status=0)."""

    def run(*arguments, status=0):
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main([str(each) for each in arguments])
        out = capsys.readouterr()
        assert (left.value.code or 0) == status, out.err + out.out
        assert "\x1b" not in out.out + out.err, "no colours where there is no terminal"
        return out.out

    return run


@pytest.fixture(scope="module")
def run(book, tmp_path_factory) -> Path:
    """A finished run of six steps."""
    out = tmp_path_factory.mktemp("runs") / "run"
    with pytest.raises(SystemExit) as left:
        main(["train", str(book), "--out", str(out), "--steps", "6", *FAST])
    assert not left.value.code
    return out


# ---- train and data ------------------------------------------------------------------------------


def test_train_shows_the_plan_the_scores_and_what_to_do_next(book, tmp_path, said):
    out = tmp_path / "run"
    shown = said("train", book, "--out", out, "--steps", 6, *FAST, "--seed", 5, "--vocab-size", 300)
    for part in ("6 steps", "context 32", "bits per byte", "best so far", "Done after 6 steps"):
        assert part in shown
    words = Corpus.open(out / "data").words_held_out()
    assert command("babyllama", "generate", out, words) in shown.replace("\n", " ") and words[0].isalnum()
    plan = api.plan_from_json(Run(out).settings["plan"])
    assert (plan.steps, plan.seed, plan.context, plan.model.vocab_size) == (6, 5, 32, 300)
    assert Run(out).steps()[-1] == 6


def test_train_resumes_a_run_that_was_stopped(book, tmp_path, said, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(TrainingScreen, "_stepped", interrupt_at(3))
        shown = said("train", book, "--out", tmp_path / "run", "--steps", 6, *FAST, status=130)
    assert "Stopped and saved at step 3." in shown
    assert squeezed(f"babyllama train --resume {tmp_path / 'run'}") in squeezed(shown)
    shown = said("train", "--resume", tmp_path / "run")
    assert "Going on from step 3." in shown and "Done after 6 steps" in shown


def squeezed(text):
    """Without white space: a long path may be broken anywhere."""
    return "".join(text.split())


def interrupt_at(step):
    def stepped(self, event):
        if event.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    return stepped


def test_data_prepares_a_text_and_train_takes_it_from_there(book, tmp_path, said):
    shown = said("data", book, "--out", tmp_path / "ids", "--vocab-size", 300)
    assert "300, a token is" in shown and f"babyllama train {tmp_path / 'ids'}" in shown
    shown = said("train", tmp_path / "ids", "--out", tmp_path / "run", "--steps", 2, *FAST)
    assert "vocabulary of 300" in shown and Run(tmp_path / "run").settings["data"] == [
        "../ids",
        str(tmp_path / "ids"),
    ]
    said("data", book, "--out", tmp_path / "again", "--tokenizer", tmp_path / "ids" / "tokenizer.json")
    tokenizers = [Tokenizer.load(tmp_path / name).sha256 for name in ("ids", "again")]
    assert tokenizers[0] == tokenizers[1]


@pytest.mark.parametrize(
    ("text", "name"),
    [("notes/", "notes"), ("a/b/book.txt", "book"), ("hub:owner/tales", "tales"), ("fairy-tales", "fairy-tales"),
     (".", Path.cwd().stem), ("C:\\texts\\mine.md", "mine")],
)  # fmt: skip
def test_a_run_is_named_for_its_text(text, name, monkeypatch, said):
    seen = {}

    def train(text, *, out, **options):
        seen.update(options, text=text, out=out)
        raise SystemExit(0)

    monkeypatch.setattr(api, "train", train)
    said("train", text, "--set", "learning_rate=0.1")
    assert seen["out"] == Path("runs") / name and seen["text"] == text and seen["learning_rate"] == 0.1


# ---- generate, info, doctor ----------------------------------------------------------------------


def test_generate_prints_the_prompt_and_what_the_model_says(run, said):
    shown = said("generate", run, "There was", "--max-tokens", 12, "--seed", 4)
    text = api.load(run).generate("There was", max_tokens=12, seed=4)
    assert shown == printable(f"There was{text}\n")


def test_every_option_of_generate_reaches_the_model(run, said, monkeypatch):
    seen = {}

    def stream(self, prompt, **options):
        seen.update(options)
        raise SystemExit(0)

    monkeypatch.setattr(api.LoadedLlama, "stream", stream)
    options = {"max_tokens": 9, "temperature": 0.2, "top_k": 3, "top_p": 0.4, "min_p": 0.1,
               "repetition_penalty": 1.3, "seed": 8}  # fmt: skip
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    said("generate", run, "x", *flags, "--stop", "a", "--stop", "b")
    assert {**seen, "stop": list(seen["stop"])} == {**options, "stop": ["a", "b"]}


def test_generate_takes_a_step_of_a_run_or_its_folder(run, said):
    step = Run(run).steps()[0]
    by_number = said("generate", run, "There", "--step", step, "--max-tokens", 9)
    assert by_number == said("generate", Run(run).folder(step), "There", "--max-tokens", 9)


def test_every_option_of_chat_reaches_the_model(run, said, monkeypatch):
    seen = {}

    def chat(self, messages, **options):
        seen.update(options, messages=[dict(message) for message in messages])
        raise SystemExit(0)

    monkeypatch.setattr(api.LoadedLlama, "chat", chat)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Hello\n"), encoding="utf-8"))
    options = {"max_tokens": 9, "temperature": 0.2, "top_k": 3, "top_p": 0.4, "min_p": 0.1,
               "repetition_penalty": 1.3, "seed": 8}  # fmt: skip
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    said("chat", run, "--system", "Be kind", *flags)
    messages = [{"role": "system", "content": "Be kind"}, {"role": "user", "content": "Hello"}]
    assert seen == {**options, "messages": messages}


def test_chat_with_a_model_trained_here_goes_on_with_what_is_written(run, said, monkeypatch):
    def typed(text):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text), encoding="utf-8"))

    typed(b"There was\nAnd\n")
    step = Run(run).steps()[0]
    shown = said("chat", run, "--max-tokens", 4, "--temperature", 0, "--step", step, "--raw")
    llama = api.load(run, step=step)
    first = llama.generate("There was", max_tokens=4, temperature=0.0)
    second = llama.generate(f"There was{first}\n\nAnd", max_tokens=4, temperature=0.0)
    assert shown == f"{first.strip()}\n{second.strip()}\n"


def test_a_chat_template_that_cannot_be_used_is_e312(run, tmp_path, capsys, monkeypatch):
    folder = shutil.copytree(Run(run).folder(Run(run).best()), tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{{ ''.__class__.__mro__ }}", encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Hello\n"), encoding="utf-8"))
    with pytest.raises(SystemExit) as left:
        main(["chat", str(folder)])
    assert left.value.code == 3 and capsys.readouterr().err.startswith("error[E312]: the chat template: ")


def test_strategies_shows_seven_ways_by_name_and_what_each_says(run, said):
    shown = said("generate", run, "There was", "--strategies", "--max-tokens", 4, "--seed", 2)
    rows = re.findall(r"^│ ([a-z-]+) +│ (.*?) *│$", shown, re.MULTILINE)
    assert [name for name, _ in rows] == list(STRATEGIES) and len(rows) == 7
    llama, texts = api.load(run), dict(rows)
    greedy = llama.generate("There was", max_tokens=4, temperature=0.0, top_p=1.0)
    warm = llama.generate("There was", max_tokens=4, temperature=1.0, top_p=1.0, seed=2)
    assert texts["greedy"].strip() in greedy and texts["random"].strip() in warm


def test_info_shows_a_run_and_a_bare_config_alike(run, said):
    folder = Run(run).folder(Run(run).best())
    config = api.load_config(run)
    shown = said("info", run)
    for part in (f"{config.n_layers}, {config.dim} wide", "parameters", "embedding", "softmax", "Memory"):
        assert part in shown, part
    without_title = shown.split("\n", 1)[1]
    assert said("info", folder / "config.json").split("\n", 1)[1] == without_title
    assert said("info", folder).split("\n", 1)[1] == without_title
    assert said("info", run, "--batch-size", 64) != shown
    assert max(map(len, shown.splitlines()[1:])) <= 80


@pytest.mark.parametrize("to", ["gguf", "meta", "hf"])
def test_export_writes_a_model_that_opens_again_and_tells_how_to_use_it(run, to, tmp_path, said, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = " ".join(said("export", run, "--to", to).split())
    written, use = {
        "gguf": ("run-f16.gguf", "ollama create run-f16 -f run-f16.Modelfile"),
        "meta": ("run-meta", "max_seq_len=32"),
        "hf": ("run-hf", "AutoModelForCausalLM.from_pretrained("),
    }[to]
    assert use in shown and written in shown and "bits per byte" in shown
    beside = {"run-f16.Modelfile"} if to == "gguf" else set()
    assert {path.name for path in tmp_path.iterdir()} == {written} | beside
    assert said("generate", written, "There was", "--max-tokens", 4).startswith("There was")
    said("export", run, "--to", to, status=4)  # nothing is written over it


def test_export_to_llama2c_goes_without_a_vocabulary_that_it_cannot_hold(run, tmp_path, said):
    said("export", run, "--to", "llama2c", "--out", tmp_path / "a.bin", status=3)
    assert not list(tmp_path.iterdir())
    said("export", run, "--to", "llama2c", "--out", tmp_path / "a.bin", "--no-tokenizer-file")
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_export_says_which_options_do_not_go_together(run, tmp_path, capsys):
    for arguments, code in (
        (["--to", "pickle"], "E101"),
        (["--to", "gguf", "--type", "q2_k"], "E101"),
        (["--to", "meta", "--type", "f16"], "E103"),
        (["--to", "gguf", "--shards", "2"], "E103"),
        (["--to", "hf", "--version", "1"], "E103"),
    ):
        with pytest.raises(SystemExit) as left:
            main(["export", str(run), "--out", str(tmp_path / "a"), *arguments])
        assert left.value.code == 2 and code in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_pull_tells_where_a_model_is_kept_and_how_to_talk_with_it(run, said, monkeypatch, capsys):
    folder = Run(run).folder(Run(run).best())
    monkeypatch.setattr(api, "pull", lambda name: folder)
    shown = said("pull", "smollm2")
    assert str(folder) in "".join(shown.split()) and "babyllama chat smollm2" in shown
    monkeypatch.undo()
    with pytest.raises(SystemExit) as left:
        main(["pull", "smollm3"])
    assert left.value.code == 3 and "E308" in capsys.readouterr().err


QUESTIONS = [
    Question((("There was", " once"), ("There was", " twice a king")), 0),
    Question((("the youngest", " was called"), ("the youngest", " three")), 1),
    Question((("There was once a king who had three", " sons"),), 0),
]


@pytest.mark.parametrize("columns", [60, 120])
def test_eval_shows_figures_with_their_errors_beside_guessing(run, book, said, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(api, "questions", lambda name, limit: QUESTIONS[:limit])
    shown = said("eval", run, "--on", "piqa", "--on", book)
    figure = r"\d[\d,.]*(e\+\d+)?"
    assert "piqa: 3 of 1,838 questions\n" in shown
    assert f"{book}: {len(list(read_file(book, Reading())))} document" in shown
    assert f"{book.stat().st_size:,} bytes\n" in shown, "on one line, however long"
    figures = [line.split() for line in shown.splitlines() if line.startswith("  ")]
    assert [line[0] for line in figures] == ["acc", "acc_norm", "perplexity", "bits"]
    for line in figures:
        assert re.fullmatch(rf"\w+ (per byte )?{figure}( ± {figure})?( guessing (0.333|8))?", " ".join(line))
    assert [line[-2:] for line in figures if line[0].startswith("acc")] == [["guessing", "0.333"]] * 2
    assert figures[-1][-2:] == ["guessing", "8"] and "guessing" not in figures[2]
    assert max(len(line.rstrip()) for line in shown.splitlines() if line.startswith("  ")) <= 60


def test_eval_of_a_run_tells_the_figure_of_its_training(book, tmp_path, said):
    trained = said("train", book, "--out", tmp_path / "run", "--steps", 4, *FAST)
    shown = said("eval", tmp_path / "run", "--step", 4, "--device", "cpu")
    told = re.search(r"Done after 4 steps: (\S+) bits per byte ± (\S+)", trained)
    found = re.search(r"bits per byte +(\S+) +± (\S+) +guessing 8", shown)
    assert told is not None and found is not None and told.groups() == found.groups()


def test_eval_prints_json_and_nothing_else(run, book, said, monkeypatch):
    monkeypatch.setattr(api, "questions", lambda name, limit: QUESTIONS[:limit])
    found = json.loads(said("eval", run, "--on", "piqa", "--on", book, "--limit", 2, "--json"))
    assert found["model"] == str(run) and [each["on"] for each in found["results"]] == ["piqa", str(book)]
    marks, score = (each["result"] for each in found["results"])
    assert found["results"][0]["items"] == 2 == marks["questions"]
    assert (
        set(marks["acc"]) == {"value", "error"} and marks["perplexity"] is None and marks["guessing"] == 0.5
    )
    assert 0 < score["bits_per_byte"] < 20 and score["bytes"] > 0


def test_eval_says_what_is_wrong(run, said, capsys):
    for arguments, status, code in (
        (["--limit", 0], 2, "E102"),
        (["--device", "abacus"], 2, "E101"),
        (["--on", "helaswag"], 3, "E308"),
        (["--step", 99], 3, "E207"),
    ):
        with pytest.raises(SystemExit) as left:
            main(["eval", str(run), *map(str, arguments)])
        assert left.value.code == status and code in capsys.readouterr().err


def test_a_bar_shows_on_stderr_how_far_a_measurement_is(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(terminal, "errors", Console(file=screen, force_terminal=True, width=60))
    with terminal.measuring() as told:
        told("a[bold]b", 1, 4)
        told("a[bold]b", 3, 4)
    assert "75 %" in screen.getvalue() and "a[bold]b" in screen.getvalue()


def test_doctor_says_what_there_is_and_that_it_computes_rightly(said):
    shown = said("doctor")
    for part in ("torch", "memory", "float32", "FLOP/s", "passed", "Training would use"):
        assert part in shown
    assert "FAILED" not in shown


# ---- story ---------------------------------------------------------------------------------------


@pytest.fixture
def small_tales(monkeypatch):
    """A small text in place of the fairy tales, one thread, and a clock that goes a tenth of a second at each look."""
    tales = [Document(f"tale {i}", f"Tale {i}. {TALE * 8}\n") for i in range(60)]
    monkeypatch.setattr(library, "named", lambda name, reading=None: iter(tales))
    now = iter(np.arange(0, 1e6, 0.1))
    monkeypatch.setattr(loop.time, "perf_counter", lambda: float(next(now)))
    monkeypatch.setattr(machine, "physical_cores", lambda: 1)


def test_a_story_is_learned_once_and_told_again(small_tales, tmp_path, said, monkeypatch):
    story = ("story", "--out", tmp_path / "run", "--minutes", 0.2)
    first = said(*story)
    assert "learns to tell" in first and "bits per byte" in first and "A story, told by" in first
    for name in ("train", "resume"):
        monkeypatch.setattr(api, name, lambda *given, **options: pytest.fail("it was trained again"))
    again = said(*story)
    assert again.strip() == first[first.index("A story, told by") :].strip()
    other = said(*story, "--seed", 2)
    assert "seed 2" in other and "--seed 3" in other


def test_a_story_that_was_interrupted_goes_on_learning_and_is_then_told(
    small_tales, tmp_path, said, monkeypatch
):
    story = ("story", "--out", tmp_path / "run", "--minutes", 0.2)
    with monkeypatch.context() as patch:
        patch.setattr(TrainingScreen, "_stepped", interrupt_at(3))
        stopped = said(*story, status=130)
    assert "Stopped and saved at step 3." in stopped and "A story" not in stopped
    shown = said(*story)
    assert "Going on from step 3." in shown and "A story, told by" in shown
    assert "Going on" not in said(*story)


def telling(monkeypatch, *parts):
    """Models say a part of these ids each time, and end with the last. Returns the list of what they are asked."""
    asked, left = [], list(parts)

    def complete(model, prompts, *, max_tokens, streams, **options):
        asked.append((prompts[0], max_tokens, streams[0]))
        ids = left.pop(0)[:max_tokens]
        return [Completion(ids, "length" if left else "stop")]

    monkeypatch.setattr(api, "complete", complete)
    return asked


def test_a_story_ends_with_its_last_whole_sentence(run, said, monkeypatch):
    words = ' a king. "Come in!" said he. He was 3.5 feet tall and his'
    ids = api.load(run).tokenizer.encode(words)
    telling(monkeypatch, ids)
    told = said("story", "--out", run)
    assert f'\n{cli.STORY_BEGINNING} a king. "Come in!" said he.\n' in told
    ids[:] = ids[:2]
    telling(monkeypatch, ids)
    told = said("story", "--out", run)
    assert cli.STORY_BEGINNING + api.load(run).tokenizer.decode(ids) in told, (
        "no sentence has ended: all of it"
    )


# ---- help ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_a_verb_explains_every_option_within_80_columns(verb, said):
    shown = said(verb, "--help")
    assert max(map(len, shown.splitlines())) <= 80
    words = re.sub(r"[│╭╮╰╯─\s]+", " ", shown)
    command = typer.main.get_command(app).commands[verb]
    for parameter in command.params:
        help = " ".join(parameter.help.split())
        first, *rest = help.split(" ")
        assert re.search(re.escape(first) + "".join(rf" {re.escape(word)}" for word in rest), words), help
        if parameter.param_type_name == "option":
            assert all(name in shown for name in parameter.opts)
    assert " ".join(command.help.split()).replace("[bold]", "").replace("[/bold]", "") in words


def test_the_help_of_the_program_lists_every_verb_and_the_exit_statuses(said):
    shown = said("--help")
    assert max(map(len, shown.splitlines())) <= 80
    assert all(re.search(rf"│ {verb} +\w", shown) for verb in VERBS)
    assert {"story", "train", "generate", "data", "eval", "info", "doctor"} <= set(VERBS)
    for status in ("2 usage", "3 bad input", "4 disk", "5 numbers", "130 or 143"):
        assert status in " ".join(shown.replace("│", " ").split())


# ---- as a program --------------------------------------------------------------------------------


def program(*arguments, **options):
    command = [sys.executable, "-m", "babyllama", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.skipif(os.name == "nt", reason="signals of Unix")
def test_a_signal_saves_says_how_to_go_on_and_the_run_goes_on(book, tmp_path, number, status):
    out = tmp_path / "run"
    training = program(
        "train", book, "--out", out, "--steps", 10**6, *FAST, "--set", "save_every=5", stdout=subprocess.PIPE
    )
    try:
        while training.poll() is None and not list(out.glob("step-*")):
            time.sleep(0.05)
        training.send_signal(number)
        shown, complaints = training.communicate(timeout=120)
    finally:
        training.kill()
    assert training.returncode == status, complaints
    assert complaints == "" and "\x1b" not in shown
    (step,) = re.findall(r"Stopped and saved at step ([\d,]+)\.", shown)
    step = int(step.replace(",", ""))
    assert squeezed(f"babyllama train --resume {out}") in squeezed(shown)
    assert Run(out).newest_intact() == (step, [])

    class EnoughError(Exception):
        pass

    events = []

    def tell(event):
        events.append(event)
        if isinstance(event, Stepped):
            raise EnoughError

    with pytest.raises(EnoughError):
        api.resume(out, tell=tell)
    assert next(event.step for event in events if isinstance(event, Started)) == step
    assert events[-1].step == step + 1


@pytest.mark.skipif(os.name == "nt", reason="pipes of Unix")
def test_a_reader_that_leaves_early_hears_no_complaint(run):
    for arguments in (("info", run), ("generate", run, "x", "--raw", "--max-tokens", 20)):
        reader, writer = os.pipe()
        os.close(reader)
        process = program(*arguments, stdout=writer)
        os.close(writer)
        _, complaints = process.communicate(timeout=120)
        assert complaints == "" and process.returncode != 0


def test_python_m_runs_the_program_and_an_error_is_two_lines_unless_debug_asks_for_more(tmp_path):
    process = program("info", tmp_path / "nowhere", stdout=subprocess.PIPE)
    shown, complaints = process.communicate(timeout=120)
    assert process.returncode == 3 and shown == ""
    assert re.fullmatch(r"error\[E201\]: .*nowhere.*\n  Fix: .*\n", complaints), complaints


@pytest.mark.parametrize("place", [0, 1, 2])
def test_debug_shows_where_an_error_comes_from_wherever_it_stands(tmp_path, place):
    arguments = ["info", str(tmp_path / "nowhere")]
    arguments.insert(place, "--debug")
    with pytest.raises(BabyLlamaError) as caught:
        main(arguments)
    assert caught.value.code == "E201" and any(entry.name == "find" for entry in caught.traceback)


def test_the_command_line_itself_loads_no_torch():
    check = "import sys, babyllama.cli; sys.exit(len({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    assert (
        subprocess.run([sys.executable, "-c", check], env=os.environ | {"PYTHONPATH": str(ROOT)}).returncode
        == 0
    )


def test_a_story_goes_on_from_its_last_words_where_the_context_is_full(run, said, monkeypatch):
    llama = api.load(run)
    parts = [llama.tokenizer.encode(f" and {each} king.") for each in ("the old " * 9, "a young", "no")]
    asked = telling(monkeypatch, *parts)
    told = said("story", "--out", run)
    assert all(llama.tokenizer.decode(part) in told for part in parts)
    context, whole = llama.config.max_seq_len, llama.encode(cli.STORY_BEGINNING)
    assert len({stream for _, _, stream in asked}) == 3, "each part has random numbers of its own"
    for (prompt, most, _), part in zip(asked, parts, strict=True):
        assert prompt == (whole if len(whole) < context else whole[-context // 2 :])
        assert most == 256 - len(whole)
        whole = whole + part
    assert len(asked[1][0]) < len(asked[0][0]) + len(parts[0]), "the context was full"


def test_a_story_has_as_many_tokens_whatever_the_context(run, monkeypatch):
    llama = api.load(run)
    monkeypatch.setattr(llama.tokenizer, "eos_ids", frozenset())
    told = llama.tokenizer.encode(api.write_story(llama, cli.STORY_BEGINNING))
    assert len(told) > 5 * llama.config.max_seq_len


@pytest.mark.parametrize(("most", "full"), [(1000, True), (3, False)])
def test_generate_says_when_the_context_is_full(run, capsys, most, full):
    with pytest.raises(SystemExit):
        main(["generate", str(run), "Once", "--max-tokens", str(most)])
    out, err = capsys.readouterr()
    assert ("The context of 32 tokens is full." in err) == full and "full" not in out


def test_a_sentence_at_the_very_end_of_a_story_is_told(run, monkeypatch, said):
    telling(monkeypatch, api.load(run).tokenizer.encode(" a king. He slept."))
    assert f"{cli.STORY_BEGINNING} a king. He slept.\n" in said("story", "--out", run)
