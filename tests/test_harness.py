"""The lm-eval harness drives a model and finds what this project finds; without it, an error says what to install."""

import importlib.util
import json
import math
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from weights import randomised

from babyllama import load
from babyllama.checkpoint.hf import model_files
from babyllama.data.questions import Question
from babyllama.errors import MachineError, UsageError
from babyllama.generate.engine import complete
from babyllama.generate.sample import Sampling
from babyllama.measure.choices import ask
from babyllama.measure.likelihood import Pair, encode_pairs, likelihoods
from babyllama.model import Config, Llama
from babyllama.text.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
TEXT = "Once upon a time a swan sang by the lake. Größe 😀, and the little king slept under the tree.\n"
CONTEXT = 32
with_the_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed:  pip install lm_eval"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A saved model, with weights so large that it has opinions."""
    tokenizer = Tokenizer.train([TEXT * 4], 290)
    config = Config(vocab_size=290, dim=32, n_layers=2, n_heads=2, max_seq_len=CONTEXT)
    model = randomised(Llama(config), 0.3, seed=1)
    path = tmp_path_factory.mktemp("model")
    for name, data in model_files(model.config, model.state_dict(), tokenizer).items():
        (path / name).write_bytes(data)
    return path


# ---- without it ----------------------------------------------------------------------------------


def test_without_the_harness_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "babyllama.harness", raising=False)
    with pytest.raises(MachineError) as caught:
        importlib.import_module("babyllama.harness")
    assert caught.value.code == "E406" and caught.value.fix == "pip install lm_eval"


def test_as_a_program_it_says_the_same_without_a_traceback(tmp_path):
    (tmp_path / "lm_eval.py").write_text("raise ImportError", encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, "-m", "babyllama.harness"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 4 and done.stderr.startswith("error[E406]: ") and "Traceback" not in done.stderr


def test_nothing_else_imports_it():
    sources = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "babyllama").rglob("*.py")}
    assert [name for name, text in sources.items() if "lm_eval" in text] == ["harness.py"]
    assert not any(
        "import harness" in text or "babyllama.harness import" in text for text in sources.values()
    )


def test_harnesses_that_look_for_plugins_find_the_class():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, name = project["entry-points"]["lm_eval.models"]["babyllama"].partition(":")
    assert f"class {name}(LM):" in (ROOT / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8")


# ---- with it -------------------------------------------------------------------------------------


@pytest.fixture
def lm(folder):
    from babyllama import harness

    return harness.BabyLlamaLM(str(folder), batch_size=1)


def instances(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, each, at) for at, each in enumerate(arguments)]


@with_the_harness
def test_likelihoods_are_those_of_the_model_and_reach_the_cache(lm, folder):
    pairs = [
        ("Once upon", " a time"),
        ("", "Once"),
        ("a swan ", "sang"),
        ("Once upon", ""),
        ("so " * 40, " far"),
    ]
    told = []
    lm.cache_hook.add_partial = lambda *each: told.append(each)
    found = lm.loglikelihood(instances("loglikelihood", *pairs), disable_tqdm=True)
    llama = load(folder)
    assert found == [tuple(each) for each in likelihoods(llama.model, encode_pairs(llama.tokenizer, pairs))]
    assert told == [("loglikelihood", pair, answer) for pair, answer in zip(pairs, found, strict=True)]
    assert lm.loglikelihood([]) == []


@with_the_harness
def test_the_border_and_the_windows_are_those_of_the_harness(lm, folder):
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    llama = load(folder)

    class Theirs(TemplateLM):
        eot_token_id = llama.tokenizer.bos_id

        def tok_encode(self, string, add_special_tokens=None, **_):
            return llama.tokenizer.encode(string, bos=add_special_tokens is None)

        def _loglikelihood_tokens(self, requests, **_):
            return [(context, after) for _, context, after in requests]

        def loglikelihood_rolling(self, requests, **_): ...
        def generate_until(self, requests, **_): ...

    pairs = [
        ("Once upon", " a time"),
        ("", "Once"),
        ("a swan ", "sang"),
        ("by  \n", " the"),
        ("Größe", " 😀,"),
    ]
    theirs = Theirs().loglikelihood(instances("loglikelihood", *pairs), disable_tqdm=True)
    assert [tuple(each) for each in encode_pairs(llama.tokenizer, pairs)] == theirs

    text = TEXT * 5
    ids, bos = llama.tokenizer.encode(text), llama.tokenizer.bos_id
    windows = [*map(make_disjoint_window, get_rolling_token_windows(ids, bos, CONTEXT, 1))]
    nats = sum(each.nats for each in likelihoods(llama.model, [Pair(*window) for window in windows]))
    assert len(windows) > 3
    assert lm.loglikelihood_rolling(instances("loglikelihood_rolling", (text,)), disable_tqdm=True) == [
        pytest.approx(nats, rel=1e-6)
    ]


@with_the_harness
def test_what_follows_a_prompt_is_what_the_model_writes(lm, folder):
    llama = load(folder)
    options = {"until": ["\n"], "max_gen_toks": 8}
    asked = [
        ("Once", options),
        ("a swan sang", {**options, "until": " "}),
        ("Größe", {**options, "max_gen_toks": 5}),
    ]
    found = lm.generate_until(instances("generate_until", *asked))
    assert found == [
        llama.generate(prompt, max_tokens=each["max_gen_toks"], temperature=0.0, stop=each["until"])
        for prompt, each in asked
    ]
    assert any(found)


@with_the_harness
def test_a_prompt_too_long_is_cut_from_the_left_to_at_least_half_of_the_context(lm, folder):
    llama = load(folder)
    ids = llama.tokenizer.encode(TEXT * 3)
    for count, kept in ((4, CONTEXT - 4), (500, CONTEXT // 2)):
        (found,) = lm.generate_until(instances("generate_until", (TEXT * 3, {"max_gen_toks": count})))
        (expected,) = complete(
            llama.model, [ids[-kept:]], max_tokens=count, sampling=Sampling(temperature=0),
            stop_ids=llama.tokenizer.eos_ids,
        )  # fmt: skip
        assert found == llama.tokenizer.decode(expected.ids)


@with_the_harness
def test_sampling_is_asked_for_with_a_temperature_and_an_unknown_option_is_refused(lm):
    def said(**options):
        return lm.generate_until(
            instances("generate_until", *[("Once", {"max_gen_toks": 12, **options})] * 40)
        )

    greedy, sampled = said(), said(temperature=1.0, top_k=50)
    assert len(set(greedy)) == 1 and len(set(sampled)) > 1
    assert said(temperature=1.0, do_sample=False) == greedy
    assert said(do_sample=True, temperature=1.0, top_k=50) == sampled
    with pytest.raises(UsageError, match="num_beams"):
        said(num_beams=3)


@with_the_harness
def test_the_device_that_the_harness_asks_for_by_default_may_be_missing(folder, caplog):
    from babyllama.harness import BabyLlamaLM

    lm = BabyLlamaLM(str(folder), device="cuda:17")
    assert "cuda:17" in caplog.text
    assert math.isfinite(
        lm.loglikelihood(instances("loglikelihood", ("Once", " upon")), disable_tqdm=True)[0][0]
    )


@with_the_harness
@pytest.mark.timeout(300)
def test_its_own_program_gives_the_marks_of_ours(folder, tmp_path):
    """A task of two made-up questions, from the command line of the harness."""
    asked = [
        Question((("Once upon a", " time"), ("Once upon a", " swan sang by the lake")), 0),
        Question(
            (("The little king", " slept"), ("The little king", " 😀"), ("The little king", " sang so")), 2
        ),
        Question((("by the", " lake"), ("by the", " tree")), 1),
    ]
    rows = [
        {"query": each.choices[0][0], "choices": [after[1:] for _, after in each.choices], "gold": each.right}
        for each in asked
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    metrics = ", ".join(
        f"{{metric: {name}, aggregation: mean, higher_is_better: true}}" for name in ("acc", "acc_norm")
    )
    task = f"""
task: made_up
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "rows.jsonl"}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{query}}}}"
doc_to_target: "{{{{gold}}}}"
doc_to_choice: choices
metric_list: [{metrics}]
"""
    (tmp_path / "made_up.yaml").write_text(task, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "babyllama.harness", "--model", "babyllama"]
    command += ["--model_args", f"path={folder}", "--tasks", "made_up", "--include_path", str(tmp_path)]
    command += ["--output_path", str(tmp_path / "out.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    (written,) = tmp_path.rglob("out*.json")
    theirs = json.loads(written.read_text(encoding="utf-8"))["results"]["made_up"]
    llama = load(folder)
    ours = ask(llama.model, llama.tokenizer, asked)
    assert (theirs["acc,none"], theirs["acc_norm,none"]) == (ours.acc.value, ours.acc_norm.value)
    assert theirs["acc_stderr,none"] == pytest.approx(ours.acc.error)
