"""TextStream: the same text as decode, whole characters only, nothing of a stop string."""

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from babyllama.errors import InputError, UsageError
from babyllama.text.stream import TextStream
from babyllama.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.train(["abab ab a\n\nUser: hello 日本 日本 é é 🎉🎉"] * 4, 300, exact=False)
STOPS = st.lists(st.text("ab日é\n", min_size=1, max_size=5), max_size=3)


def _stream(ids: list[int], stop: list[str]) -> tuple[list[str], TextStream]:
    stream = TextStream(TOKENIZER, stop)
    return [*(stream.push(id) for id in ids), stream.flush()], stream


def _oracle(text: str, stop: list[str]) -> str:
    """The text in front of the stop string that is complete first, the longest of those."""
    for end in range(len(text) + 1):
        starts = [end - len(s) for s in stop if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)]
    return text


@given(st.text())
def test_streamed_text_is_decoded_text_on_random_unicode(text: str) -> None:
    for ids in (
        TOKENIZER.encode(text),
        [200, *TOKENIZER.encode(text, bos=True, eos=True)],
    ):
        parts, stream = _stream(ids, [])
        assert "".join(parts) == TOKENIZER.decode(ids)
        assert not stream.stopped


@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1)))
def test_streamed_text_is_decoded_text_on_random_ids(ids: list[int]) -> None:
    assert "".join(_stream(ids, [])[0]) == TOKENIZER.decode(ids)


@given(st.text(min_size=1))
def test_no_push_shows_half_a_character(text: str) -> None:
    assume("\ufffd" not in text)
    assert not any("\ufffd" in part for part in _stream(TOKENIZER.encode(text), [])[0])


@given(st.text("ab日é\n User:", max_size=30), STOPS)
@example("ab", ["abc", "b"])
@example("aab", ["aab", "ab", "b"])
@example("aaab", ["aab"])
def test_text_ends_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    ids = [id for letter in text for id in TOKENIZER.encode(letter)]  # as many borders as possible
    for way in (ids, TOKENIZER.encode(text)):
        parts, stream = _stream(way, stop)
        assert "".join(parts) == _oracle(text, stop)
        assert stream.stopped == any(s in text for s in stop)


@given(st.text("ab日\n", max_size=30), STOPS)
def test_only_the_beginning_of_a_stop_string_is_held_back(text: str, stop: list[str]) -> None:
    stream, shown = TextStream(TOKENIZER, stop), ""
    for at, letter in enumerate(text, 1):
        for id in TOKENIZER.encode(letter):
            shown += stream.push(id)
        if stream.stopped:
            break
        begun = [n for s in stop for n in range(1, len(s)) if text[:at].endswith(s[:n])]
        assert shown == text[: at - max(begun, default=0)]


def test_after_a_stop_nothing_more_is_said() -> None:
    stream = TextStream(TOKENIZER, "\n\nUser:")
    said = [stream.push(id) for id in TOKENIZER.encode("hello\n\nUser: hello")]
    assert "".join(said) == "hello"
    assert stream.stopped
    assert [stream.push(id) for id in TOKENIZER.encode("hello")] == [""] * len(TOKENIZER.encode("hello"))
    assert stream.flush() == ""


def test_half_a_character_at_the_end_becomes_a_replacement() -> None:
    ids = [
        next(id for id in range(300) if TOKENIZER.token_bytes(id) == bytes([byte])) for byte in "🎉".encode()
    ]
    for kept in range(1, 4):
        parts, _ = _stream(ids[:kept], [])
        assert parts == [""] * kept + ["\ufffd"]


def test_a_stop_string_that_never_ends_is_shown_by_flush() -> None:
    assert _stream(TOKENIZER.encode("ab"), ["bc"])[0][-1] == "b"


def test_the_space_of_sentencepiece_goes_only_after_bos(fixture_file) -> None:
    tokenizer = Tokenizer.load(fixture_file("tok512.bin"))
    ids = tokenizer.encode("Once upon a time", bos=True)
    for cut in range(1, len(ids)):
        first, second = TextStream(tokenizer), TextStream(tokenizer)
        begun = "".join(map(first.push, ids[:cut])) + first.flush()
        assert begun + "".join(map(second.push, ids[cut:])) == (
            "Once upon a time" if cut > 1 else " Once upon a time"
        )


def test_an_empty_stop_string_is_e102() -> None:
    with pytest.raises(UsageError) as error:
        TextStream(TOKENIZER, ["a", ""])
    assert error.value.code == "E102"


def test_an_id_outside_the_vocabulary_is_e309() -> None:
    with pytest.raises(InputError) as error:
        TextStream(TOKENIZER).push(TOKENIZER.vocab_size)
    assert error.value.code == "E309"
