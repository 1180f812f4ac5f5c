"""Log-likelihoods are those of one plain pass for each text, however texts are batched, shared and cut."""

import json
import math

import numpy as np
import pytest
import torch

from babyllama.errors import NumericalError
from babyllama.measure import likelihood
from babyllama.measure.likelihood import Likelihood, Pair, encode_pairs, likelihoods
from babyllama.text.tokenizer import Tokenizer

TEXT = "The swan sang by the lake, and the lake sang by the swan. Größe 😀 was said of the king. " * 6


def plainly(model, pair):
    """One pass over one text."""
    ids = torch.tensor([[*pair.context, *pair.continuation]])
    with torch.no_grad():
        logits = model(ids[:, :-1])[0, len(pair.context) - 1 :].double().log_softmax(-1)
    targets = torch.tensor(pair.continuation)
    nats = float(logits[range(len(targets)), targets].sum())
    return Likelihood(nats, bool((logits.argmax(-1) == targets).all()))


def same(found, expected):
    assert [each.greedy for each in found] == [each.greedy for each in expected]
    assert [each.nats for each in found] == pytest.approx(
        [each.nats for each in expected], rel=2e-5, abs=1e-5
    )


def some_pairs(vocab_size=97, seed=0):
    """Contexts of one to five choices, some with a common beginning, some one token long, some twice there."""
    chance, pairs = np.random.default_rng(seed), []
    for length in (1, 2, 3, 3, 7, 12, 20, 30, 30, 41):
        context = chance.integers(0, vocab_size, length).tolist()
        beginning = chance.integers(0, vocab_size, chance.integers(0, 4)).tolist()
        for _ in range(chance.integers(1, 6)):
            own = chance.integers(0, vocab_size, chance.integers(1, 9)).tolist()
            pairs.append(Pair(context, [*(beginning if chance.random() < 0.7 else []), *own]))
    pairs += [pairs[3], pairs[0], Pair(pairs[0].context, pairs[0].continuation[:1])]
    chance.shuffle(order := list(range(len(pairs))))
    return [pairs[at] for at in order]


# ---- one pass, many passes -----------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [1, 40, 10**6])
def test_batches_and_shared_contexts_change_nothing(random_llama, monkeypatch, at_once):
    monkeypatch.setattr(likelihood, "TOKENS_AT_ONCE", at_once)
    model, pairs = random_llama(), some_pairs()
    same(likelihoods(model, pairs), [plainly(model, pair) for pair in pairs])


def seen_by_the_head(model, monkeypatch):
    """The shapes of all logits that are made from now on."""
    seen, head = [], model.head

    def keep(x):
        logits = head(x)
        seen.append(tuple(logits.shape))
        return logits

    monkeypatch.setattr(model, "head", keep)
    return seen


@pytest.mark.parametrize("at_once", [1, 97, 97 * 5 + 96, 97 * 10**6])
@pytest.mark.parametrize("tied", [False, True])
def test_no_more_logits_are_made_at_once_than_may_be(random_llama, monkeypatch, at_once, tied):
    model, pairs = random_llama(tie_embeddings=tied), some_pairs()
    long = np.random.default_rng(3).integers(0, 97, 150).tolist()  # two rows and more, all of them scored
    pairs += [Pair(long[:1], long[1:]), Pair(long[:60], long[60:64]), Pair(long[:60], long[70:74])]
    expected = [plainly(model, pair) for pair in pairs[:-3]]
    usual = likelihoods(model, pairs)
    monkeypatch.setattr(likelihood, "LOGITS_AT_ONCE", at_once)
    seen = seen_by_the_head(model, monkeypatch)
    found = likelihoods(model, pairs)
    same(found[:-3], expected)
    same(found, usual)
    assert max(math.prod(shape) for shape in seen) <= max(at_once, 97), "of one token at least"
    assert at_once != 97 * 5 + 96 or max(seen) == (5, 97), "as many as may be"


def test_logits_are_made_only_where_a_token_is_scored_and_once(random_llama, monkeypatch):
    model, context = random_llama(), list(range(30))
    seen = seen_by_the_head(model, monkeypatch)
    likelihoods(model, [Pair(context, [50, 51, each, each + 1, each + 2]) for each in (60, 70, 80)])
    assert seen == [(3, 97), (6, 97)]  # 50, 51 and the first that is not shared; then two of each


def test_a_large_vocabulary_costs_no_accuracy(random_llama, monkeypatch):
    """One likely token and 49,999 unlikely ones: added one after another in float32, they would be off by 1e-4."""
    model = random_llama(vocab_size=50_000)
    logits = torch.full((1, 50_000), -12.2)
    logits[0, 0] = 0.0
    monkeypatch.setattr(model, "head", lambda x: logits.expand(len(x), -1))
    expected = float(logits.double().log_softmax(-1)[0, 7])
    assert likelihoods(model, [Pair([1], [7])])[0].nats == pytest.approx(expected, abs=5e-6)


def test_what_rows_are_filled_up_with_does_not_matter(random_llama, monkeypatch):
    model, pairs = random_llama(), some_pairs()
    expected = likelihoods(model, pairs)
    filled = []

    def with_others(rows, device):
        width = max(map(len, rows))
        filled.append(sum(width - len(row) for row in rows))
        return torch.tensor([[*row, *[96] * (width - len(row))] for row in rows])

    monkeypatch.setattr(likelihood, "_filled", with_others)
    assert likelihoods(model, pairs) == expected
    assert sum(filled) > 20


def test_what_choices_share_is_worked_on_once(random_llama):
    model, seen = random_llama(), []
    model.tok_embeddings.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0].shape))
    context = list(range(30))
    likelihoods(model, [Pair(context, [50, 51, each, each + 1, each + 2]) for each in (60, 70, 80)])
    assert [tuple(shape) for shape in seen] == [(1, 32), (3, 2)]  # 30 and [50, 51]; then each and each + 1
    seen.clear()
    likelihoods(model, [Pair(context, [each]) for each in (60, 70, 80, 80)])
    assert [tuple(shape) for shape in seen] == [(1, 30)]


def test_equal_pairs_have_exactly_equal_likelihoods(random_llama):
    model, pairs = random_llama(), some_pairs()
    found: dict[str, set[Likelihood]] = {}
    for pair, each in zip(pairs * 2, likelihoods(model, pairs * 2), strict=True):
        found.setdefault(str(pair), set()).add(each)
    assert all(len(each) == 1 for each in found.values())


def test_what_the_model_would_write_is_greedy_and_nothing_else(random_llama):
    model, written = random_llama(), [5, 17, 40]
    for _ in range(6):
        with torch.no_grad():
            written.append(int(model(torch.tensor([written]))[0, -1].argmax()))
    for last in range(4, 10):
        other = [*written[3 : last - 1], (written[last - 1] + 1) % 97]
        found = likelihoods(model, [Pair(written[:3], written[3:last]), Pair(written[:3], other)])
        assert [each.greedy for each in found] == [True, False]
    wrong = [*written[:3], (written[3] + 1) % 97]
    with torch.no_grad():
        likeliest = int(model(torch.tensor([wrong]))[0, -1].argmax())
    assert not likelihoods(model, [Pair(written[:3], [wrong[3], likeliest])])[0].greedy, "the first is not"


def test_an_empty_continuation_costs_nothing(random_llama):
    model = random_llama()
    found = likelihoods(model, [Pair([1, 2], []), Pair([1, 2], [3])])
    assert found[0] == Likelihood(0.0, True) and found[1].nats < 0
    assert likelihoods(model, []) == []


# ---- longer than the context ---------------------------------------------------------------------


def test_a_context_that_leaves_too_little_room_is_cut_from_the_left(random_llama):
    model, chance = random_llama(max_seq_len=16), np.random.default_rng(1)
    long = chance.integers(0, 97, 60).tolist()
    for count in (1, 2, 15, 16):
        last = long[-(17 - count) :]  # all but the last target make 16 inputs
        continuation = chance.integers(0, 97, count).tolist()
        same(likelihoods(model, [Pair(long, continuation)]), [plainly(model, Pair(last, continuation))])


@pytest.mark.parametrize("count", [17, 31, 32, 33, 70])
def test_a_continuation_longer_than_the_context_is_scored_in_windows(random_llama, count):
    model, targets = (
        random_llama(max_seq_len=16),
        np.random.default_rng(count).integers(0, 97, count).tolist(),
    )
    context = [3, 9]
    nats = 0.0
    for at, target in enumerate(targets):  # a pass for each token
        if at < 16:
            before = [9, *targets[:at]]
        else:
            end = min(at // 16 * 16 + 16, count)
            before = targets[end - 17 : at]
        with torch.no_grad():
            nats += float(model(torch.tensor([before]))[0, -1].double().log_softmax(-1)[target])
    assert likelihoods(model, [Pair(context, targets)])[0].nats == pytest.approx(nats, rel=1e-5)


def test_progress_ends_with_all_of_it(random_llama):
    told = []
    likelihoods(random_llama(max_seq_len=16), some_pairs(), lambda *each: told.append(each))
    assert told[-1][0] == told[-1][1] >= len(some_pairs()) and told == sorted(told)


def test_a_likelihood_that_is_not_finite_is_e502(random_llama):
    model = random_llama()
    model.norm.weight.data[3] = math.nan
    with pytest.raises(NumericalError) as caught:
        likelihoods(model, some_pairs())
    assert caught.value.code == "E502"


# ---- where a continuation begins -----------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT], 300)


@pytest.fixture(scope="module")
def without_bos(tokenizer) -> Tokenizer:
    """The same vocabulary in a file that does not ask for BOS, as that of SmolLM2."""
    layout = json.loads(tokenizer.files()["tokenizer.json"])
    layout["post_processor"] = None
    return Tokenizer({**tokenizer.files(), "tokenizer.json": json.dumps(layout).encode()})


def test_bos_stands_first_and_once_where_the_tokenizer_asks_for_it(tokenizer, without_bos):
    context, after = "The swan sang", " by the lake"
    (pair,) = encode_pairs(tokenizer, [(context, after)])
    assert pair.context == [tokenizer.bos_id, *tokenizer.encode(context)]
    assert pair.context + pair.continuation == tokenizer.encode(context + after, bos=True)
    assert tokenizer.decode(pair.continuation) == after
    assert (tokenizer.puts_bos, without_bos.puts_bos) == (True, False)
    assert encode_pairs(without_bos, [(context, after)]) == [Pair(pair.context[1:], pair.continuation)]


def test_without_a_context_bos_stands_there_in_any_case(tokenizer, without_bos):
    for each in (tokenizer, without_bos):
        expected = Pair([each.bos_id], each.encode("The swan"))
        assert encode_pairs(each, [("", "The swan")]) == [expected]
        assert encode_pairs(each, [(" ", "The swan")]) == [Pair([each.bos_id], each.encode(" The swan"))]


def test_white_space_at_the_border_belongs_to_the_continuation(tokenizer):
    moved, usual = encode_pairs(
        tokenizer, [("The swan ", "sang by the lake"), ("The swan", " sang by the lake")]
    )
    assert moved == usual
    assert tokenizer.decode(moved.continuation) == " sang by the lake"


def test_an_empty_continuation_has_no_ids(tokenizer):
    assert encode_pairs(tokenizer, [("The swan", "")])[0].continuation == []


def test_a_border_within_a_token_moves_to_where_the_token_begins(tokenizer):
    (pair,) = encode_pairs(tokenizer, [("the kin", "g")])
    assert len(tokenizer.encode("the king")) <= len(tokenizer.encode("the kin")), "the case that is meant"
    assert pair.context + pair.continuation == tokenizer.encode("the king", bos=True)
    assert len(pair.continuation) > 0 and len(pair.context) > 1
