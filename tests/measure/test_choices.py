"""Marks: those that transformers gives, one text at a time, and error bars that mean what they say."""

import math

import numpy as np
import pytest
import torch

from babyllama import load
from babyllama.data.questions import Question, questions
from babyllama.measure.choices import Figure, ask, mark, mean
from babyllama.measure.likelihood import Likelihood, encode_pairs, likelihoods
from babyllama.model import Config, Llama
from babyllama.text.tokenizer import Tokenizer

MADE_UP = [
    Question((("The swan sang by the", " lake."), ("The swan sang by the", " tree of the king.")), 0),
    Question((("The king ", "said so"), ("The king ", "sang"), ("The king ", "slept by the lake")), 2),
    Question((("The king was", " Größe 😀"), ("The king was", " so so so so so so")), 1),
    Question((("Since the swan", " sang by the lake."), ("Since the king", " sang by the lake.")), 1),
    Question((("The swan sang by the", " lake"),), 0),
    Question(
        (("The swan sang by the lake and the king sang so so so so so so", " Größe 😀 of the king"),), 0
    ),
    Question((("", "The swan"), ("", "The lake and the king")), 0),
]


def by_hand(twins, asked):
    """acc, acc_norm and perplexity with their errors, from one pass of transformers for each choice."""
    right, normed, nats = [], [], []
    for question in asked:
        found = [twins.plainly(*choice) for choice in question.choices]
        if len(found) == 1:
            right.append(found[0][1])
            nats.append(found[0][0])
            continue
        sums = np.array([each for each, _ in found])
        lengths = [len(after[1:] if after[0] == " " else after) for _, after in question.choices]
        right.append(sums.argmax() == question.right)
        normed.append((sums / lengths).argmax() == question.right)
    if all(len({after for _, after in question.choices}) == 1 for question in asked):  # as in winogrande
        normed = []
    figures = [
        (np.mean(each), np.std(each, ddof=1) / math.sqrt(len(each))) for each in (right, normed) if each
    ]
    if nats:
        perplexity = math.exp(-np.mean(nats))
        figures.append((perplexity, perplexity * np.std(nats, ddof=1) / math.sqrt(len(nats))))
    return figures


def figures(marks):
    return [(each.value, each.error) for each in (marks.acc, marks.acc_norm, marks.perplexity) if each]


def check(twins, asked):
    pairs = [choice for question in asked for choice in question.choices]
    found = likelihoods(twins.model, encode_pairs(twins.tokenizer, pairs))
    expected = [twins.plainly(*pair) for pair in pairs]
    assert [each.nats for each in found] == pytest.approx([nats for nats, _ in expected], rel=1e-4)
    assert [each.greedy for each in found] == [greedy for _, greedy in expected]
    told = []
    marks = ask(twins.model, twins.tokenizer, asked, lambda *each: told.append(each))
    assert marks.questions == len(asked) and told[-1] == (len(pairs), len(pairs))
    assert np.array(figures(marks)) == pytest.approx(np.array(by_hand(twins, asked)), rel=1e-3)
    return marks


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    words = [" ".join(part for choice in question.choices for part in choice) for question in MADE_UP]
    return Tokenizer.train(words * 9, 300)


@pytest.fixture(scope="module")
def twins(random_llama, tokenizer, twins_of):
    return twins_of(random_llama(vocab_size=300, max_seq_len=32), tokenizer)


# ---- the same as transformers --------------------------------------------------------------------


def test_marks_are_those_of_transformers(twins):
    marks = check(twins, MADE_UP)
    assert marks.acc_norm is not None and marks.perplexity is not None


def test_a_word_that_the_model_would_say_is_found(twins):
    """Made from what transformers writes, so that acc is not 0 whatever is done."""
    asked, text = [], " ".join(part for question in MADE_UP for choice in question.choices for part in choice)
    for end in range(3, len(text), 4):
        ids = twins.their_tokenizer(text[:end].rstrip())["input_ids"]
        with torch.no_grad():
            said = twins.tokenizer.decode(
                [int(twins.theirs(torch.tensor([ids[-32:]])).logits[0, -1].argmax())]
            )
        asked += [Question(((text[:end].rstrip(), each),), 0) for each in (said, " lake") if each.strip()]
    expected = [twins.plainly(*question.choices[0])[1] for question in asked]
    assert 5 <= sum(expected) <= len(asked) - 5, "the case that is meant"
    assert check(twins, asked).acc.value == sum(expected) / len(asked)


@pytest.mark.parametrize("name", ["hellaswag", "lambada"])
def test_forty_questions_have_the_marks_of_transformers(package, random_llama, twins_of, name):
    asked = questions(name, 40, cache=package)
    texts = [" ".join(choice) for question in asked for choice in question.choices]
    tokenizer = Tokenizer.train(texts, 600)
    model = random_llama(vocab_size=600, max_seq_len=96)  # so short that contexts are cut
    assert max(len(tokenizer.encode(text)) for text in texts) > 120
    check(twins_of(model, tokenizer), asked)


@pytest.mark.parametrize("name", ["hellaswag", "lambada", "winogrande"])
def test_a_trained_model_has_the_marks_of_transformers_on_forty_questions(
    package, twins_of, fixture_file, name
):
    llama = load(fixture_file("stories260K.bin"), tokenizer=fixture_file("tok512.bin"))
    marks = check(twins_of(llama.model, llama.tokenizer), questions(name, 40, cache=package))
    assert marks.acc.value > 0


# ---- marks of known likelihoods ------------------------------------------------------------------


def marked(choices, nats, right):
    question = Question(tuple(("so", each) for each in choices), right)
    return mark([question], [[Likelihood(each, False) for each in nats]])


def test_of_equally_likely_choices_the_first_is_taken():
    assert marked([" a", " b"], [-1.0, -1.0], 0).acc.value == 1
    assert marked([" a", " b"], [-1.0, -1.0], 1).acc.value == 0
    assert marked([" ab", " a"], [-2.0, -1.0], 0).acc_norm == Figure(1.0, None)


def test_acc_norm_is_per_character_without_the_space_before():
    marks = marked([" größe", " ab"], [-5.0, -3.0], 0)  # 1 a character, not 5 / 7 a byte; 1.5
    assert (marks.acc.value, marks.acc_norm.value) == (0, 1)
    assert marked([" größe", " ab"], [-5.0, -1.9], 0).acc_norm.value == 0  # 1; 0.95
    assert marked([" a", " abc"], [-1.0, -2.4], 1).acc_norm.value == 1  # 1; 0.8, with the space 0.5; 0.6
    assert marked([" größe", " abcd"], [-5.0, -3.4], 1).acc_norm.value == 1  # 1; 0.85, but 5 / 7 a byte


def test_an_empty_choice_is_marked_too():
    assert marked(["", " a"], [0.0, -1.0], 0).acc_norm.value == 1


def test_where_all_choices_go_on_alike_there_is_no_acc_norm():
    question = Question((("he", " came"), ("she", " came")), 1)
    marks = mark([question], [[Likelihood(-2.0, False), Likelihood(-1.0, False)]])
    assert (marks.acc.value, marks.acc_norm, marks.perplexity, marks.guessing) == (1, None, None, 0.5)


def test_guessing_is_the_mean_over_questions_of_different_numbers_of_choices():
    asked = [Question((("a", " b"),) * count, 0) for count in (2, 4, 5)]
    marks = mark(asked, [[Likelihood(-1.0, False)] * len(question.choices) for question in asked])
    assert marks.guessing == pytest.approx((1 / 2 + 1 / 4 + 1 / 5) / 3)


def test_perplexity_of_a_model_that_knows_nothing_is_the_vocabulary(tokenizer):
    model = Llama(Config(vocab_size=300, dim=16, n_layers=1, n_heads=1, max_seq_len=64))
    for weight in model.parameters():
        weight.data.zero_()
    word = next(
        each
        for each in (" the", " sang", " king")
        if len(tokenizer.encode("swan" + each)) == len(tokenizer.encode("swan")) + 1
    )
    asked = [Question((("The swan", word),), 0), Question((("by the swan", word),), 0)]
    marks = ask(model, tokenizer, asked)
    assert marks.perplexity.value == pytest.approx(300, rel=1e-5)
    assert marks.perplexity.error == pytest.approx(0, abs=0.01)
    assert (marks.acc_norm, marks.guessing) == (None, 0)


def test_the_perplexity_of_the_worst_model_is_still_a_number():
    marks = mark([Question((("a", " b"),), 0)], [[Likelihood(-1e6, False)]])
    assert math.isfinite(marks.perplexity.value) and marks.perplexity.error is None


# ---- error bars ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("right", "asked"), [(30, 100), (1, 2), (0, 50), (9, 1000)])
def test_the_error_of_a_share_is_that_of_the_binomial(right, asked):
    share = right / asked
    found = mean([1.0] * right + [0.0] * (asked - right))
    assert found.value == share
    assert found.error == pytest.approx(math.sqrt(share * (1 - share) / (asked - 1)))


def test_the_error_is_the_spread_of_what_repeating_gives():
    chance = np.random.default_rng(0)
    shares = chance.binomial(200, 0.3, 4000) / 200
    errors = [mean((chance.random(200) < 0.3).astype(float).tolist()).error for _ in range(200)]
    assert np.mean(errors) == pytest.approx(shares.std(), rel=0.05)


def test_the_error_of_a_perplexity_is_the_spread_of_what_repeating_gives():
    chance, found = np.random.default_rng(0), []
    for _ in range(1000):
        nats = -chance.exponential(1.0, 400)
        asked = [Question((("a", " b"),), 0)] * len(nats)
        found.append(mark(asked, [[Likelihood(each, False)] for each in nats.tolist()]).perplexity)
    assert np.mean([each.error for each in found]) == pytest.approx(
        np.std([each.value for each in found]), rel=0.1
    )


def test_one_question_has_no_error_bar():
    assert mean([1.0]) == Figure(1.0, None)
