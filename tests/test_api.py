"""The surface in Python: any model opens, and says the same however it is asked."""

import json
import math
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from weights import randomised

import babyllama
from babyllama import api, machine
from babyllama.api import LoadedLlama, Planned, load, load_config
from babyllama.checkpoint.folder import verify_folder
from babyllama.checkpoint.hf import build, model_files
from babyllama.checkpoint.run import Run
from babyllama.data.questions import Question
from babyllama.errors import BabyLlamaError, InputError, NumericalError, UsageError
from babyllama.generate.engine import Token
from babyllama.measure.choices import ask
from babyllama.model import Config, Llama
from babyllama.text.tokenizer import BOS, EOS, Tokenizer
from babyllama.train.evaluate import score
from babyllama.train.loop import Evaluated, Outcome, Started

TEXT = "Once upon a time a swan sang by the lake. Größe 😀, and the little king slept under the tree.\n"
CONTEXT = 48


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT * 4], 290)


def weights(config: Config, seed: int) -> dict[str, torch.Tensor]:
    return randomised(Llama(config, seed=0), 0.2, seed=seed).state_dict()


def config(tokenizer: Tokenizer) -> Config:
    return Config(vocab_size=tokenizer.vocab_size, dim=32, n_layers=2, n_heads=2, max_seq_len=CONTEXT)


def same(llama: LoadedLlama, expected: dict[str, torch.Tensor]) -> bool:
    found = llama.model.state_dict()
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.fixture(scope="module")
def run(tokenizer, tmp_path_factory) -> Run:
    """A run of three saved steps, of which the middle one is the best."""
    made = Run.create(tmp_path_factory.mktemp("runs") / "run", {})
    for step, bits in ((10, 3.0), (20, 1.5), (30, 2.0)):
        files = model_files(config(tokenizer), weights(config(tokenizer), step), tokenizer)
        made.save(step, files, {"step": step, "bits_per_byte": bits})
    return made


@pytest.fixture(scope="module")
def llama(run) -> LoadedLlama:
    return load(run.path)


def refused(code, call, *arguments, **options) -> BabyLlamaError:
    with pytest.raises(BabyLlamaError) as caught:
        call(*arguments, **options)
    assert caught.value.code == code, caught.value
    return caught.value


# ---- opening -------------------------------------------------------------------------------------


def test_of_a_run_the_best_step_is_opened_or_the_one_asked_for(run, tokenizer):
    assert run.steps() == [20, 30]
    assert same(load(run.path), weights(config(tokenizer), 20))
    assert same(load(str(run.path), step=30), weights(config(tokenizer), 30))
    assert same(load(run.folder(30)), weights(config(tokenizer), 30)), "a step is a folder like any other"
    refused("E207", load, run.path, step=10)


def test_a_folder_saved_by_transformers_is_opened_with_its_tokenizer(tokenizer, tmp_path):
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=tokenizer.vocab_size, hidden_size=36, intermediate_size=50, num_hidden_layers=2,
            num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5,
            bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id,
        )
    ).eval()  # fmt: skip
    theirs.save_pretrained(tmp_path)
    core = tmp_path / "core.json"
    core.write_bytes(tokenizer.files()["tokenizer.json"])
    PreTrainedTokenizerFast(tokenizer_file=str(core), bos_token=BOS, eos_token=EOS).save_pretrained(tmp_path)
    opened = load(tmp_path)
    ids = opened.encode(TEXT)[:40]
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0].numpy()
    assert ids == tokenizer.encode(TEXT, bos=True)[:40]
    assert np.abs(opened.logits(ids) - expected).max() <= 1e-5 * np.abs(expected).max()
    assert opened.tokenizer.eos_ids == tokenizer.eos_ids


@pytest.fixture
def llama2c(tokenizer, tmp_path) -> Path:
    V, sizes = tokenizer.vocab_size, (16, 24, 1, 2, 2)
    numbers = V * 16 + 2 * 16 + 4 * 16 * 16 + 3 * 24 * 16 + 16 + 2 * CONTEXT * 4
    floats = np.random.default_rng(0).normal(0, 0.3, numbers).astype("<f4")
    path = tmp_path / "model.bin"
    path.write_bytes(struct.pack("<7i", *sizes, V, CONTEXT) + floats.tobytes())
    return path


def test_a_llama2c_file_needs_a_tokenizer_and_then_writes(llama2c, run, tokenizer):
    assert "--tokenizer" in refused("E103", load, llama2c).fix
    opened = load(llama2c, tokenizer=run.folder(20) / "tokenizer.json")
    assert opened.tokenizer.sha256 == tokenizer.sha256 and opened.config.dim == 16
    assert len(opened.generate("Once", max_tokens=5, seed=1)) > 0
    assert load_config(llama2c) == opened.config


def test_the_sizes_alone_can_be_read_from_whatever_holds_them(run, tokenizer):
    places = (run.path, run.folder(30), run.folder(30) / "config.json")
    assert [load_config(place) for place in places] == [config(tokenizer)] * 3


def test_a_tokenizer_given_by_name_is_used_and_one_that_is_too_large_is_refused(run, tokenizer, tmp_path):
    larger = Tokenizer.train([TEXT * 4], 300)
    other = Tokenizer.train([TEXT.upper() * 4], 270)
    for name, each in (("larger", larger), ("other", other)):
        (tmp_path / f"{name}.json").write_bytes(each.files()["tokenizer.json"])
    assert load(run.path, tokenizer=tmp_path / "other.json").tokenizer.sha256 == other.sha256
    assert "299" in refused("E309", load, run.path, tokenizer=tmp_path / "larger.json").found


def test_what_holds_no_model_is_refused(tmp_path):
    refused("E201", load, tmp_path)
    refused("E201", load, tmp_path / "nowhere")
    refused("E201", load, "a" * 5000)
    refused("E201", load_config, tmp_path)
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    refused("E202", load, tmp_path)


# ---- text ----------------------------------------------------------------------------------------

OPTIONS = [
    {},
    {"temperature": 0.0},
    {"temperature": 1.3, "top_k": 7},
    {"top_p": 0.5, "min_p": 0.02, "repetition_penalty": 1.2},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_a_generated_text_is_the_joined_stream(llama, options):
    text = llama.generate("Once upon", max_tokens=30, seed=3, **options)
    pieces = list(llama.stream("Once upon", max_tokens=30, seed=3, **options))
    assert text and "".join(pieces) == text and len(pieces) > 5 and "" not in pieces


def test_a_seed_gives_its_text_every_time_and_another_seed_another(llama):
    texts = [llama.generate("Once", max_tokens=30, seed=seed) for seed in (0, 1, 2, 0, 1, 2)]
    assert texts[:3] == texts[3:] and len(set(texts)) == 3
    assert llama.generate("Once", max_tokens=30) == texts[0], "seed 0 unless another is given"


def test_every_option_reaches_the_sampler(llama, monkeypatch):
    seen = {}
    monkeypatch.setattr(api, "generate", lambda model, prompts, **options: seen.update(options) or iter(()))
    options = {
        "temperature": 0.3, "top_k": 4, "top_p": 0.6, "min_p": 0.1, "repetition_penalty": 1.5, "seed": 9
    }  # fmt: skip
    assert llama.generate("Once", max_tokens=7, **options) == ""
    assert {name: getattr(seen["sampling"], name) for name in options} == options
    assert seen["max_tokens"] == 7 and seen["stop_ids"] == llama.tokenizer.eos_ids


@pytest.mark.parametrize("prompt", ["", "Once upon a time", "<|begin_of_text|>x"])
def test_a_prompt_begins_with_one_bos_and_typed_control_tokens_are_text(llama, monkeypatch, prompt):
    seen = []
    monkeypatch.setattr(api, "generate", lambda model, prompts, **options: seen.extend(prompts) or iter(()))
    llama.generate(prompt)
    bos = llama.tokenizer.bos_id
    assert seen == [[bos, *llama.tokenizer.encode(prompt)]] and seen[0].count(bos) == 1
    assert llama.encode(prompt) == seen[0]


def test_no_tokens_are_no_text_and_no_more_come_than_are_allowed(llama):
    assert llama.generate("Once", max_tokens=0) == ""
    one, three = (llama.generate("Once", max_tokens=n, seed=5, temperature=0.0) for n in (1, 3))
    assert three.startswith(one.rstrip("�")) and len(three.encode()) > len(one.encode()) > 0


def test_a_text_ends_where_the_context_is_full(llama):
    prompt = "Once upon a time"
    room = CONTEXT - len(llama.encode(prompt))
    count = []
    push = api.TextStream.push
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api.TextStream, "push", lambda self, id: count.append(id) or push(self, id))
        patch.setattr(llama.tokenizer, "eos_ids", frozenset())
        llama.generate(prompt, max_tokens=10**6)
    assert len(count) == room
    refused("E311", llama.generate, "swan " * 200)


def said(monkeypatch, ids):
    """From now on every model says these ids."""
    tokens = [Token(0, id, place) for place, id in enumerate(ids)]
    monkeypatch.setattr(api, "generate", lambda model, prompts, **options: iter(tokens))


def test_nothing_of_a_stop_string_is_ever_shown(llama, monkeypatch):
    said(monkeypatch, llama.tokenizer.encode(TEXT))
    assert llama.generate("") == TEXT
    for stop in (".", "sang by the", "lake. G", "😀", "O"):
        pieces = list(llama.stream("", stop=stop))
        assert "".join(pieces) == TEXT[: TEXT.index(stop)]
    assert llama.generate("", stop=("tree", "king", "nowhere")) == TEXT[: TEXT.index("king")]
    for stop in ("never said", ".\nNever said"):
        assert llama.generate("", stop=stop) == TEXT, "and nothing is held back at the end"
    refused("E102", llama.generate, "", stop="")


def test_a_stop_string_ends_the_work_too(llama, monkeypatch):
    tokens = iter([Token(0, id, place) for place, id in enumerate(llama.tokenizer.encode(TEXT))])
    monkeypatch.setattr(api, "generate", lambda model, prompts, **options: tokens)
    llama.generate("", stop="time")
    assert len(list(tokens)) > 20, "the rest was never asked for"


def test_no_piece_of_a_text_holds_half_a_character(llama, monkeypatch):
    spelled = Tokenizer.train([TEXT], 261).encode("Größe 😀 ü")  # a token for each byte
    assert len(spelled) == len("Größe 😀 ü".encode())
    said(monkeypatch, spelled)
    assert list(llama.stream("")) == list("Größe 😀 ü")
    said(monkeypatch, spelled[:10])  # the end comes in the middle of 😀
    assert list(llama.stream("")) == [*"Größe ", "�"]


@pytest.mark.parametrize(
    "options", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}, {"max_tokens": -1}, {"seed": -1}]
)
def test_an_option_out_of_range_is_refused(llama, options):
    with pytest.raises(UsageError) as caught:
        llama.generate("Once", **options)
    assert caught.value.code == "E102"


# ---- conversations -------------------------------------------------------------------------------

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message.role + '<|end_header_id|>' }}"
    "{{ message.content }}<|eot_id|>{% endfor %}{{ '<|start_header_id|>' if add_generation_prompt }}"
)
HELLO = [{"role": "user", "content": "Once"}]


@pytest.fixture(scope="module")
def talker(llama):
    """The same model with a chat template."""
    tokenizer = Tokenizer({**llama.tokenizer.files(), "chat_template.jinja": TEMPLATE.encode()})
    made = LoadedLlama(llama.config, tokenizer, llama.model)
    yield made
    made.chat_template.close()


def test_an_answer_goes_on_with_the_ids_of_the_conversation(talker):
    answer = talker.chat(HELLO, max_tokens=9, temperature=0.0)
    pieces = list(answer)
    ids = talker.chat_template.prompt(HELLO)
    expected = [int(talker.logits(ids)[-1].argmax())]
    for _ in range(8):
        expected.append(int(talker.logits([*ids, *expected])[-1].argmax()))
    assert "".join(pieces) == talker.tokenizer.decode(expected)
    assert (answer.prompt_tokens, answer.tokens, answer.left_out, answer.ended) == (len(ids), 9, 0, False)


def test_every_option_of_a_chat_reaches_the_sampler_and_every_end_the_engine(talker, monkeypatch):
    seen = {}
    monkeypatch.setattr(api, "generate", lambda model, prompts, **options: seen.update(options) or iter(()))
    options = {
        "temperature": 0.3, "top_k": 4, "top_p": 0.6, "min_p": 0.1, "repetition_penalty": 1.5, "seed": 9
    }  # fmt: skip
    assert list(talker.chat(HELLO, max_tokens=7, **options)) == []
    assert {name: getattr(seen["sampling"], name) for name in options} == options and seen["max_tokens"] == 7
    ends = {talker.tokenizer.special_names[id] for id in seen["stop_ids"]}
    assert ends == {EOS, "<|eot_id|>"}
    talker.chat(HELLO)
    assert seen["max_tokens"] == CONTEXT // 4


@pytest.mark.parametrize("end", [EOS, "<|eot_id|>", "<|end_header_id|>"])
def test_an_answer_ends_at_its_end_tokens_and_says_that_it_ended(talker, monkeypatch, end):
    names = {name: id for id, name in talker.tokenizer.special_names.items()}
    said = iter([*talker.tokenizer.encode("ab"), names[end], *talker.tokenizer.encode("c")])
    monkeypatch.setattr("babyllama.generate.engine.sample", lambda *given: np.array([next(said)]))
    answer = talker.chat(HELLO, max_tokens=4)
    ends = end != "<|end_header_id|>"
    assert "".join(answer) == ("ab" if ends else "abc") and answer.ended is ends
    assert answer.tokens == (2 if ends else 4)


def test_a_stop_string_ends_an_answer(talker, monkeypatch):
    said(monkeypatch, talker.tokenizer.encode("abcdef"))
    answer = talker.chat(HELLO, stop="cd")
    assert "".join(answer) == "ab" and answer.ended


def test_old_messages_make_room_for_a_quarter_of_the_context(talker):
    turns = [{"role": role, "content": f"{n}"} for n in range(9) for role in ("user", "assistant")]
    messages = [{"role": "system", "content": "S"}, *turns, *HELLO]
    answer = talker.chat(messages)
    assert answer.left_out > 0 and answer.prompt_tokens <= CONTEXT * 3 // 4
    assert answer.prompt_tokens == len(
        talker.chat_template.prompt([messages[0], *messages[answer.left_out + 1 :]])
    )
    less = talker.chat(messages, max_tokens=1)
    assert less.left_out < answer.left_out and less.prompt_tokens < CONTEXT


def test_a_message_longer_than_the_context_is_e311(talker):
    longest = CONTEXT - len(talker.chat_template.prompt([{"role": "user", "content": ""}]))
    for tokens, fits in ((longest - 1, True), (longest, False), (longest + 1, False)):
        messages = [{"role": "user", "content": "9" * tokens}]
        assert len(talker.chat_template.prompt(messages)) == CONTEXT - longest + tokens
        if fits:
            answer = talker.chat(messages)
            list(answer)  # nothing is refused while it is written
            assert answer.left_out == 0
        else:
            assert "context 48" in refused("E311", talker.chat, messages).found


def test_a_model_without_a_template_goes_on_with_the_text(llama, monkeypatch):
    seen = []
    monkeypatch.setattr(api, "generate", lambda model, prompts, **options: seen.extend(prompts) or iter(()))
    llama.chat(HELLO)
    assert seen == [llama.encode("Once")] and llama.chat_template.plain
    llama.chat_template.close()


@pytest.mark.parametrize("messages", ["Once", [], [{"role": "wizard", "content": "x"}], [{"role": "user"}]])
def test_what_is_no_conversation_is_a_usage_error(talker, messages):
    with pytest.raises(UsageError):
        talker.chat(messages)
    with pytest.raises(UsageError):
        talker.chat(HELLO, max_tokens=-1)


# ---- numbers -------------------------------------------------------------------------------------


def test_logits_are_those_of_the_model(llama):
    ids = llama.encode(TEXT)[:CONTEXT]
    with torch.no_grad():
        expected = llama.model(torch.tensor([ids]))[0].numpy()
    found = llama.logits(ids)
    assert found.dtype == np.float32 and found.shape == (len(ids), llama.config.vocab_size)
    assert np.array_equal(found, expected)
    assert np.allclose(llama.logits(ids[:5]), expected[:5], atol=1e-4)


def test_logits_of_ids_that_the_model_does_not_have_or_of_too_many_are_refused(llama):
    most = llama.config.vocab_size
    for ids in ([-1], [0, most], [most + 5, 0]):
        assert refused("E309", llama.logits, ids).where
    for ids in ([], [0] * (CONTEXT + 1)):
        assert str(CONTEXT) in refused("E311", llama.logits, ids).found
    assert llama.logits([most - 1] * CONTEXT).shape == (CONTEXT, most)


def test_bits_per_byte_of_a_text_are_its_score(llama):
    text = TEXT * 3
    ids = np.array(llama.tokenizer.encode(text, bos=True))
    scored = score(llama.model, ids, llama.tokenizer.byte_lengths(), CONTEXT)
    assert scored.bytes == len(text.encode()) and math.isfinite(scored.bits_per_byte)
    assert llama.bits_per_byte(text) == scored.bits_per_byte
    short = TEXT[:20]
    logits = llama.logits(llama.encode(short))[:-1]
    targets = llama.tokenizer.encode(short)
    nats = np.log(np.exp(logits.astype(np.float64)).sum(axis=1)) - logits[range(len(targets)), targets]
    assert llama.bits_per_byte(short) == pytest.approx(nats.sum() / math.log(2) / len(short), rel=1e-5)
    refused("E303", llama.bits_per_byte, "")


def test_the_module_is_built_once_and_when_it_is_first_asked_for(run, monkeypatch):
    built = []
    monkeypatch.setattr(api, "build", lambda *given: built.append(1) or build(*given))
    opened = load(run.path)
    assert opened.config.dim == 32 and opened.tokenizer.vocab_size == 290 and built == []
    assert opened.model is opened.model and built == [1] and not opened.model.training


# ---- training ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    (folder / "book.txt").write_text("".join(f"{i}. {TEXT}\n" for i in range(150)), encoding="utf-8")
    events = []
    run = babyllama.train(
        folder / "book.txt", out=folder / "run", steps=6, size="100k", device="cpu", vocab_size=300,
        tell=events.append, context=32, batch_size=4, threads=1, precision="float32", save_every=2,
        evaluations=2, evaluation_tokens=10**6,
    )  # fmt: skip
    return run, events


def test_training_returns_its_run_tells_from_plan_to_outcome_and_opens(trained):
    run, events = trained
    assert isinstance(run, babyllama.Run) and run.steps()[-1] == 6
    assert (
        isinstance(events[0], Planned) and isinstance(events[1], Started) and isinstance(events[-1], Outcome)
    )
    assert events[0].plan == api.plan_from_json(run.settings["plan"]) and events[-1].step == 6
    opened = babyllama.load(run.path)
    assert opened.config == events[0].plan.model and opened.tokenizer.vocab_size == 300
    assert math.isfinite(opened.bits_per_byte(TEXT)) and opened.generate("Once", max_tokens=3)


def test_what_is_shown_of_a_model_goes_on_from_words_that_are_held_out(trained):
    _, events = trained
    shown = [event.sample for event in events if isinstance(event, Evaluated)]
    corpus = events[0].corpus
    words = {" ".join(sample.split()[:2]) for sample in shown}
    assert len(shown) == 2 and len(words) == 1
    assert words.pop() in " ".join(corpus.tokenizer.decode(corpus.val_ids.tolist()).split())


def test_a_run_that_was_moved_goes_on_with_the_text_inside_it(trained, tmp_path):
    shutil.copytree(trained[0].path, tmp_path / "elsewhere")
    events = []
    api.resume(tmp_path / "elsewhere", step=4, tell=events.append)
    assert next(event.step for event in events if isinstance(event, Started)) == 4
    assert events[0].corpus.fingerprint == trained[1][0].corpus.fingerprint
    weights = [path.joinpath("step-00000006", "model.safetensors").read_bytes()
               for path in (trained[0].path, tmp_path / "elsewhere")]  # fmt: skip
    assert weights[0] == weights[1]


def test_what_a_run_was_started_with_stands_in_it(trained):
    run, events = trained
    settings = json.loads((run.path / "run.json").read_text(encoding="utf-8"))
    assert settings["text"].endswith("book.txt") and settings["data"] == ["data"]
    assert settings["fingerprint"] == events[0].corpus.fingerprint
    assert settings["plan"]["steps"] == 6 and settings["plan"]["save_every"] == 2


def test_a_device_that_computes_wrongly_is_not_trained_on(monkeypatch):
    wrong = machine.SelfCheck("cuda", logits=0.5, gradients=0.0, products=0.0, seconds=0.1)
    monkeypatch.setattr(machine, "self_check", lambda device: wrong)
    with pytest.raises(NumericalError) as caught:
        api.check_device("cuda")
    assert caught.value.code == "E503" and "--device cpu" in caught.value.fix
    api.check_device("cpu")  # with which the others are compared


# ---- on the disk ---------------------------------------------------------------------------------


@pytest.fixture
def on_the_disk(monkeypatch):
    """The inodes of the files and folders that were waited for, in order."""
    waited, fsync = [], os.fsync

    def watched(handle):
        waited.append(os.fstat(handle).st_ino)
        fsync(handle)

    monkeypatch.setattr("babyllama.checkpoint.folder.os.fsync", watched)
    return waited


@pytest.mark.skipif(os.name == "nt", reason="Windows names no inodes")
def test_a_step_gets_its_name_only_when_all_of_it_is_on_the_disk(tmp_path, monkeypatch, on_the_disk):
    run, seen, rename = Run.create(tmp_path / "run", {}), [], Path.rename

    def watched(self, target):
        verify_folder(self)
        assert {path.stat().st_ino for path in (self, *self.iterdir())} <= set(on_the_disk)
        seen.append(Path(target).name)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", watched)
    run.save(7, {"model.safetensors": b"1" * 1000}, {"step": 7})
    assert seen == ["step-00000007"] and on_the_disk[-1] == run.path.stat().st_ino, "the name too"


@pytest.mark.skipif(os.name == "nt", reason="Windows names no inodes")
def test_a_run_begins_with_a_file_that_is_on_the_disk(tmp_path, on_the_disk):
    run = Run.create(tmp_path / "run", {})
    assert on_the_disk[-2:] == [path.stat().st_ino for path in (run.path / "run.json", run.path)]


# ---- the package ---------------------------------------------------------------------------------


def test_the_package_offers_its_names_and_no_others():
    assert set(babyllama.__all__) == {
        "BabyLlamaError", "Config", "Llama", "LoadedLlama", "Run", "Tokenizer", "load", "resume", "train"
    }  # fmt: skip
    for name in babyllama.__all__:
        assert callable(getattr(babyllama, name)) and (name in dir(babyllama))
    assert babyllama.load is load and babyllama.Config is Config and babyllama.Run is Run
    with pytest.raises(AttributeError, match="generat"):
        _ = babyllama.generat
    assert issubclass(InputError, babyllama.BabyLlamaError)


def test_what_stands_in_a_file_cannot_fill_a_terminal_or_write_on_it():
    found = InputError("E203", "a.gguf", "holds \x1b[2J\ud800 ▁ and\n" + "x" * 10**6 + " of it", "none").found
    assert found.startswith(r"holds \x1b[2J\ud800 ▁ and" + "\n") and found.endswith("x of it")
    assert len(found) < 3100


def test_bits_per_byte_count_the_bytes_of_the_text_and_no_dummy_space(tmp_path):
    pieces = [(f"<0x{byte:02X}>", 0.0) for byte in range(256)] + [(" ", -3.0), ("a", -2.0), (" a", -1.0)]
    content = struct.pack("<i", 6)
    for piece, value in [("<unk>", 0.0), ("\n<s>\n", 0.0), ("\n</s>\n", 0.0), *pieces]:
        content += struct.pack("<fi", value, len(piece.encode())) + piece.encode()
    (tmp_path / "tokenizer.bin").write_bytes(content)
    tokenizer = babyllama.Tokenizer.load(tmp_path / "tokenizer.bin")
    config = babyllama.Config(vocab_size=tokenizer.vocab_size, dim=16, n_layers=1, n_heads=2, max_seq_len=32)
    llama = babyllama.LoadedLlama(config, tokenizer, babyllama.Llama(config, seed=1))
    text = "a a b"  # the first " a" stands for one byte of it, the second for two
    ids = llama.encode(text)
    logs = torch.tensor(llama.logits(ids[:-1])).log_softmax(-1)
    nats = -sum(float(logs[i, id]) for i, id in enumerate(ids[1:]))
    assert llama.bits_per_byte(text) == pytest.approx(nats / math.log(2) / len(text), rel=1e-5)


def test_the_bos_of_a_tokenizer_is_its_own_and_not_a_default_of_the_model(tmp_path):
    ours = Tokenizer.train(["There was once a king who had three sons. " * 9], 270)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=270, **sizes)).save_pretrained(tmp_path)
    core = tmp_path / "core.json"
    core.write_bytes(ours.files()["tokenizer.json"])
    PreTrainedTokenizerFast(tokenizer_file=str(core), bos_token=BOS, eos_token=EOS).save_pretrained(tmp_path)
    assert api.load(tmp_path).encode("x") == ours.encode("x", bos=True)


def test_a_text_is_scored_behind_bos_and_a_prompt_has_one_only_where_the_tokenizer_says_so(llama, tmp_path):
    layout = json.loads(llama.tokenizer.files()["tokenizer.json"])
    layout["post_processor"] = None  # as SmolLM2's
    files = {**llama.tokenizer.files(), "tokenizer.json": json.dumps(layout).encode()}
    without = LoadedLlama(llama.config, Tokenizer(files), llama.model)
    text = "Once upon a time"
    assert without.encode(text) == llama.encode(text)[1:]
    assert without.bits_per_byte(text) == llama.bits_per_byte(text)


# ---- measuring -----------------------------------------------------------------------------------

QUESTIONS = [
    Question((("Once upon a", " time"), ("Once upon a", " swan sang")), 0),
    Question((("The little", " king"), ("The little", " tree slept"), ("The little", " 😀")), 2),
]


@pytest.fixture
def asked(monkeypatch):
    """A set of two questions, which nothing has to be downloaded for."""
    monkeypatch.setattr(api, "questions", lambda name, limit: QUESTIONS[:limit])
    return "piqa"


def test_a_run_is_measured_on_what_it_holds_out_with_the_figure_it_told_itself(trained):
    run, events = trained
    (found,) = api.evaluate(run.path, step=run.steps()[-1], device="cpu")
    last = events[-1].score
    assert found.result.bits_per_byte == pytest.approx(last.bits_per_byte, rel=1e-5)
    assert found.result.error == pytest.approx(last.error, rel=1e-4)
    assert (found.result.tokens, found.result.bytes) == (last.tokens, last.bytes)
    corpus = api.Corpus.open(run.path / "data")
    assert found.items == found.items_in_all == corpus.val_documents
    assert str(run.path) in found.on and found.result.bytes == corpus.val_bytes


def test_prepared_data_are_measured_on_what_they_hold_out(trained):
    run, _ = trained
    (whole,) = api.evaluate(run.path, device="cpu")
    (same,) = api.evaluate(run.path, [run.path / "data"], device="cpu")
    assert same.result == whole.result and same.items == whole.items


def test_a_limit_takes_the_first_documents_of_what_is_held_out(trained):
    run, _ = trained
    corpus, llama = api.Corpus.open(run.path / "data"), load(run.path)
    (found,) = api.evaluate(run.path, limit=1, device="cpu")
    ends = np.flatnonzero(corpus.val_ids == corpus.tokenizer.eos_id)
    ids = corpus.val_ids[: ends[0] + 1]
    lengths = llama.tokenizer.byte_lengths()
    assert found.result == score(llama.model, np.asarray(ids), lengths, llama.config.max_seq_len)
    assert (found.items, found.items_in_all) == (1, corpus.val_documents) and len(ends) > 1
    everything = api.evaluate(run.path, device="cpu")
    assert api.evaluate(run.path, limit=10**6, device="cpu") == everything


def test_a_text_is_measured_as_documents_between_bos_and_eos(llama, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT * 2, encoding="utf-8")
    (tmp_path / "b.txt").write_text(" \n", encoding="utf-8")
    (tmp_path / "c.md").write_text(TEXT.upper(), encoding="utf-8")
    tokenizer, told = llama.tokenizer, []
    ids = [id for text in (TEXT * 2, TEXT.upper()) for id in tokenizer.encode(text, bos=True, eos=True)]
    expected = score(llama.model, np.array(ids), tokenizer.byte_lengths(), CONTEXT)
    (found,) = api.evaluate(llama, [tmp_path], progress=lambda *each: told.append(each))
    assert found.result == expected and found.result.bytes == len((TEXT * 2 + TEXT.upper()).encode())
    assert (found.on, found.items, found.items_in_all) == (str(tmp_path), 2, 2)
    assert told[0] == (str(tmp_path), 0, told[-1][2]) and told[-1][1] == told[-1][2] and told == sorted(told)
    (first,) = api.evaluate(llama, [tmp_path], limit=1)
    assert (first.items, first.items_in_all) == (1, None) and first.result.bytes == len((TEXT * 2).encode())


def test_a_text_of_another_form_is_read_as_it_is_said_to_be(llama, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json.dumps({"story": TEXT}).encode("utf-16"))
    (found,) = api.evaluate(llama, [tmp_path / "a.jsonl"], encoding="utf-16", field="story")
    assert found.result.bytes == len(TEXT.encode())
    refused("E302", api.evaluate, llama, [tmp_path / "a.jsonl"])


def test_sets_and_texts_are_measured_in_the_order_in_which_they_are_named(run, asked, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    found = api.evaluate(run.path, [asked, tmp_path / "a.txt", asked], step=30, device="cpu")
    assert [each.on for each in found] == ["piqa", str(tmp_path / "a.txt"), "piqa"]
    llama = load(run.path, step=30)
    assert found[0].result == found[2].result == ask(llama.model, llama.tokenizer, QUESTIONS)
    assert (found[0].items, found[0].items_in_all) == (2, 1838)
    assert [each.items for each in api.evaluate(run.path, [asked], limit=1)] == [1]


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_refused_whatever_it_limits(llama, tmp_path, limit):
    refused("E102", api.evaluate, llama, ["hellaswag"], limit=limit)
    refused("E102", api.evaluate, llama, [tmp_path], limit=limit)


def test_a_model_is_measured_on_the_device_that_is_named_or_the_best(run, asked, tmp_path, monkeypatch):
    checked = []
    monkeypatch.setattr(api, "check_device", checked.append)
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    monkeypatch.setattr(machine, "best_device", lambda: "abacus")
    found = api.evaluate(run.path, [asked, tmp_path / "a.txt"], device="cpu")
    monkeypatch.setattr(machine, "best_device", lambda: "cpu")
    assert api.evaluate(run.path, [asked, tmp_path / "a.txt"]) == found and checked == ["cpu", "cpu"]
    llama = load(run.path)
    monkeypatch.setattr(machine, "best_device", lambda: "abacus")
    assert api.evaluate(llama, [asked, tmp_path / "a.txt"]) == found and len(checked) == 2, "where it lies"
    refused("E101", api.evaluate, tmp_path / "nothing", [asked], device="abacus")


def test_memory_that_a_device_does_not_have_is_e404(llama, asked, monkeypatch):
    def ask_too_much(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(api, "ask", ask_too_much)
    error = refused("E404", api.evaluate, llama, [asked])
    assert "20.00 GiB" in error.found and error.fix.endswith("--device cpu")


@pytest.mark.cuda
def test_a_gpu_measures_what_the_cpu_measures_and_the_model_comes_back(llama, asked, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT * 3, encoding="utf-8")
    before = {name: weight.clone() for name, weight in llama.model.state_dict().items()}
    marks, text = (each.result for each in api.evaluate(llama, [asked, tmp_path / "a.txt"], device="cpu"))
    their_marks, their_text = (
        each.result for each in api.evaluate(llama, [asked, tmp_path / "a.txt"], device="cuda")
    )
    assert their_marks == marks and (their_text.tokens, their_text.bytes) == (text.tokens, text.bytes)
    assert their_text.bits_per_byte == pytest.approx(text.bits_per_byte, rel=1e-5)
    assert same(llama, before) and next(llama.model.parameters()).device.type == "cpu"


def test_what_there_is_nothing_to_measure_on_is_refused_before_anything_is_opened(
    run, llama, tmp_path, monkeypatch
):
    for model in (llama, run.folder(20), tmp_path / "nothing"):
        assert refused("E103", api.evaluate, model).where == "--on"
    for name, nearest in (("helaswag", "hellaswag"), ("fairytales", "fairy-tales"), ("arc_easy", "arc-easy")):
        error = refused("E308", api.evaluate, tmp_path / "nothing", ["lambada", name])
        assert error.fix.endswith(nearest) and "winogrande" in error.found and "shakespeare" in error.found
    monkeypatch.chdir(tmp_path)
    Path("lambada").write_text(TEXT, encoding="utf-8")
    error = refused("E103", api.evaluate, llama, ["lambada"])
    (found,) = api.evaluate(llama, [error.fix.split()[-1]])
    assert found.result.bytes == len(TEXT.encode())


def test_texts_that_cannot_be_measured_are_refused(llama, trained, tmp_path):
    (tmp_path / "blank.txt").write_text(" \n \n", encoding="utf-8")
    refused("E301", api.evaluate, llama, [tmp_path / "blank.txt"])
    refused("E309", api.evaluate, llama, [trained[0].path / "data"])


def test_a_model_that_says_no_numbers_is_refused(tokenizer, tmp_path):
    model = Llama(config(tokenizer))
    model.norm.weight.data.fill_(math.nan)
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    refused("E502", api.evaluate, LoadedLlama(config(tokenizer), tokenizer, model), [tmp_path / "a.txt"])
