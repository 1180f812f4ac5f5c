"""Bits per byte: every token once, in the context that was promised, whatever the tokenizer."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from weights import randomised

from babyllama.errors import InputError
from babyllama.model import Config, Llama
from babyllama.text.tokenizer import Tokenizer
from babyllama.train import evaluate
from babyllama.train.evaluate import score

TEXT = "The swan sang by the lake, and the lake sang by the swan. Größe 😀 " * 6


def uniform(vocab_size):
    return lambda tokens: torch.zeros(*tokens.shape, vocab_size)


def by_target(nats):
    """A model that gives each id its own cost in nats, wherever it stands. The last id takes what is left over."""
    nats = np.asarray(nats, dtype=np.float64)
    logits = torch.tensor([*-nats, math.log(1 - np.exp(-nats).sum())])
    return lambda tokens: logits.expand(*tokens.shape, len(logits))


def watched(vocab_size):
    """A uniform model, and the list of the rows it was shown."""
    rows = []

    def logits(tokens):
        rows.extend(tokens.tolist())
        return uniform(vocab_size)(tokens)

    return logits, rows


# ---- which tokens, in which context --------------------------------------------------------------


def brute_force(model, ids, lengths, context):
    """One pass for each token. A part begins every context / 2 tokens, and its last token has the whole context."""
    stride, nats = max(1, context // 2), 0.0
    for target in range(1, len(ids)):
        last_of_part = ((target - 1) // stride + 1) * stride
        first_seen = max(0, last_of_part - context)
        assert target - first_seen >= min(target, context / 2)
        with torch.no_grad():
            logits = model(torch.tensor([ids[first_seen:target]]))[0, -1].double()
        nats -= float(logits.log_softmax(-1)[ids[target]])
    return nats / math.log(2) / sum(lengths[id] for id in ids[1:])


@pytest.mark.parametrize("context", [1, 2, 5, 8, 40])
@pytest.mark.parametrize("at_once", [1, evaluate.LOGITS_AT_ONCE])
def test_bits_per_byte_are_those_of_one_pass_for_each_token(monkeypatch, context, at_once):
    monkeypatch.setattr(evaluate, "LOGITS_AT_ONCE", at_once)
    model = Llama(Config(vocab_size=23, dim=24, n_layers=2, n_heads=2, max_seq_len=64), seed=0)
    randomised(model, 0.5, seed=1)
    chance = np.random.default_rng(2)
    ids, lengths = chance.integers(0, 23, 33), chance.integers(0, 5, 23).tolist()
    found = score(model, ids, lengths, context)
    assert found.bits_per_byte == pytest.approx(brute_force(model, ids.tolist(), lengths, context), rel=1e-5)
    assert found.tokens == 32 and found.bytes == sum(lengths[id] for id in ids[1:])


@given(st.integers(2, 90), st.integers(1, 33), st.sampled_from([1, 500, 2**24]))
def test_every_token_but_the_first_is_scored_exactly_once(length, context, at_once):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "LOGITS_AT_ONCE", at_once)
        nats = 5.0 + np.random.default_rng(length).random(
            90
        )  # one cost for each, so none can stand for another
        ids = np.random.default_rng(context).permutation(90)[:length]
        found = score(by_target(nats), ids, [1] * 91, context)
    assert found.tokens == found.bytes == length - 1
    assert found.nats_per_token * found.tokens == pytest.approx(nats[ids[1:]].sum(), rel=1e-6)


def test_no_more_rows_are_asked_for_at_once_than_fit(monkeypatch):
    monkeypatch.setattr(evaluate, "LOGITS_AT_ONCE", 3 * 10 * 50)
    shapes = []

    def logits(tokens):
        shapes.append(tuple(tokens.shape))
        return uniform(50)(tokens)

    score(logits, np.arange(50).repeat(3), [1] * 50, 10)
    assert set(shapes[:-1]) == {(3, 10)} and shapes[-1][0] <= 3
    shapes.clear()
    monkeypatch.setattr(evaluate, "TOKENS_AT_ONCE", 25)
    score(logits, np.arange(50).repeat(3), [1] * 50, 10)
    assert set(shapes[:-1]) == {(2, 10)}


@pytest.mark.parametrize(("rows_at_once", "expected"), [(1, 5), (2, 4), (3, 3), (5, 5), (8, 8)])
def test_rows_are_asked_for_in_multiples_of_what_is_worked_on_at_once(monkeypatch, rows_at_once, expected):
    """More than fit, where that many are worked on in any case."""
    monkeypatch.setattr(evaluate, "TOKENS_AT_ONCE", 50)
    shapes = []

    def logits(tokens):
        shapes.append(tuple(tokens.shape))
        return uniform(50)(tokens)

    found = score(logits, np.arange(50).repeat(3), [1] * 50, 10, rows_at_once=rows_at_once)
    assert set(shapes[:-1]) == {(expected, 10)} and found.tokens == 149


# ---- bytes ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizers():
    by_bytes, pairs = Tokenizer.train([TEXT], 261), Tokenizer.train([TEXT], 290)
    assert len(pairs.encode(TEXT)) < 0.6 * len(by_bytes.encode(TEXT)) == 0.6 * len(TEXT.encode())
    return by_bytes, pairs


def test_a_model_that_knows_nothing_needs_the_logarithm_of_the_vocabulary_for_each_token(tokenizers):
    for tokenizer in tokenizers:
        ids = np.array(tokenizer.encode(TEXT, bos=True))
        found = score(uniform(tokenizer.vocab_size), ids, tokenizer.byte_lengths(), 64)
        expected = math.log2(tokenizer.vocab_size) * (len(ids) - 1) / len(TEXT.encode())
        assert found.bits_per_byte == pytest.approx(expected, rel=1e-6)
        assert found.bytes == len(TEXT.encode())


def test_a_blind_guess_among_256_bytes_is_eight_bits():
    ids = np.frombuffer(TEXT.encode(), dtype=np.uint8)
    assert score(uniform(256), ids, [1] * 256, 32).bits_per_byte == pytest.approx(8.0, rel=1e-6)


def test_the_tokenizer_does_not_change_the_bits_of_what_is_predicted_alike(tokenizers):
    found = []
    for tokenizer in tokenizers:  # every byte costs log2(257) bits, in whatever tokens it comes
        nats = [math.log(257) * length if length else 100.0 for length in tokenizer.byte_lengths()]
        ids = np.array(tokenizer.encode(TEXT, bos=True))
        found.append(score(by_target(nats), ids, [*tokenizer.byte_lengths(), 0], 64).bits_per_byte)
    assert found[0] == pytest.approx(math.log2(257), rel=1e-6) and found[1] == pytest.approx(
        found[0], rel=1e-6
    )


def test_control_tokens_cost_bits_and_add_no_bytes(tokenizers):
    tokenizer = tokenizers[1]
    bos, eos, words = tokenizer.bos_id, tokenizer.eos_id, tokenizer.encode(TEXT)
    ids = np.array([bos, *words, eos, bos, *words, eos])
    found = score(uniform(tokenizer.vocab_size), ids, tokenizer.byte_lengths(), 64)
    assert found.bytes == 2 * len(TEXT.encode()) and found.tokens == 2 * len(words) + 3
    assert found.bits_per_byte == pytest.approx(
        math.log2(tokenizer.vocab_size) * found.tokens / found.bytes, rel=1e-6
    )


# ---- the error bar -------------------------------------------------------------------------------


def test_the_error_of_parts_of_one_byte_is_the_standard_error_of_their_mean():
    chance = np.random.default_rng(0)
    nats, ids = 4.0 + 4 * chance.random(40), chance.integers(0, 40, 300)
    found = score(by_target(nats), ids, [1] * 41, 1)
    bits = nats[ids[1:]] / math.log(2)
    assert found.bits_per_byte == pytest.approx(bits.mean(), rel=1e-6)
    assert found.error == pytest.approx(bits.std(ddof=1) / math.sqrt(len(bits)), rel=1e-5)


def test_the_error_is_that_of_drawing_parts_again():
    chance, context = np.random.default_rng(1), 8
    nats, lengths = 4.0 + 4 * chance.random(40), chance.integers(1, 9, 41)
    ids = chance.integers(0, 40, 1601)
    found = score(by_target(nats), ids, lengths.tolist(), context)
    parts = ids[1:].reshape(-1, context // 2)
    cost, size = nats[parts].sum(axis=1), lengths[parts].sum(axis=1)
    drawn = chance.integers(0, len(parts), (3000, len(parts)))
    ratios = cost[drawn].sum(axis=1) / size[drawn].sum(axis=1) / math.log(2)
    assert found.error == pytest.approx(ratios.std(), rel=0.06)


def test_a_text_of_one_part_has_no_error_to_tell():
    assert score(uniform(9), np.arange(5), [1] * 9, 16).error is None


# ---- a part of the text, and texts that are too short --------------------------------------------


@pytest.mark.parametrize("max_tokens", [10, 70, 100, 990, 1990])
def test_a_limit_takes_evenly_from_the_whole_text_and_always_the_same(max_tokens):
    length, context = 2000, 20
    ids = np.arange(length)  # an id is a place
    logits, rows = watched(length)
    found = score(logits, ids, [1] * length, context, max_tokens)
    assert max_tokens - context // 2 < found.tokens <= max_tokens
    ends = [max(row) for row in rows]
    gaps = np.diff(ends[:-1]).tolist()
    assert not gaps or max(gaps) - min(gaps) <= context // 2, "evenly"
    assert ends[0] < context and (len(ends) == 1 or ends[-1] + 2 * (ends[1] - ends[0]) > length - 1)
    again, other_rows = watched(length)
    assert score(again, ids, [1] * length, context, max_tokens) == found and other_rows == rows


@pytest.mark.parametrize("max_tokens", [None, 50, 10**9])
def test_a_limit_above_the_text_takes_all_of_it(max_tokens):
    assert score(uniform(50), np.arange(50), [1] * 50, 8, max_tokens).tokens == 49


def test_two_tokens_are_enough_and_the_second_is_scored():
    found = score(by_target([3.0, 5.0]), np.array([0, 1]), [1, 2, 0], 16)
    assert (found.tokens, found.bytes) == (1, 2)
    assert found.bits_per_byte == pytest.approx(5.0 / math.log(2) / 2, rel=1e-6)


@pytest.mark.parametrize("ids", [[], [3], [0, 0, 0]], ids=["nothing", "one token", "only control tokens"])
def test_a_text_without_a_byte_to_predict_is_refused(ids):
    with pytest.raises(InputError) as caught:
        score(uniform(9), np.array(ids, dtype=np.int64), [0, *[1] * 8], 16)
    assert caught.value.code == "E303"
