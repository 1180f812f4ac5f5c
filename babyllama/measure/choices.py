"""Questions -> marks: how often the likeliest choice is the right one, and how sure that is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from babyllama.data.questions import Question
from babyllama.measure.likelihood import Likelihood, Progress, encode_pairs, likelihoods
from babyllama.model import Llama
from babyllama.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Figure:
    """A mean, and its standard error: the spread of what was averaged, over the root of their number."""

    value: float
    error: float | None  # None: one value has no spread


@dataclass(frozen=True, kw_only=True)
class Marks:
    """What came of a set of questions.

    acc         share of questions whose right choice has the largest log-likelihood. Where nothing is offered: share
                of those whose answer is, token by token, what the model finds likeliest.
    acc_norm    the same with log-likelihoods divided by the characters of the choice, without the space before it, so
                that short choices have no advantage. None where the choices of a question all go on alike.
    perplexity  exp of the mean nats of an answer, all of its tokens together. None where there is a choice.
    guessing    the acc that comes of guessing.
    """

    questions: int
    acc: Figure
    acc_norm: Figure | None
    perplexity: Figure | None
    guessing: float


def ask(
    model: Llama, tokenizer: Tokenizer, questions: Sequence[Question], progress: Progress | None = None
) -> Marks:
    """Put the questions, at least one, to the model.

    Source: [lm-eval] api/task.py, ConfigurableTask.process_results; acc_norm per character is the one of its tasks.
    Raises what measure.likelihood.likelihoods raises.
    """
    pairs = encode_pairs(tokenizer, [choice for question in questions for choice in question.choices])
    answers = iter(likelihoods(model, pairs, progress))
    return mark(questions, [[next(answers) for _ in question.choices] for question in questions])


def mark(questions: Sequence[Question], answers: Sequence[Sequence[Likelihood]]) -> Marks:
    """The marks, of the likelihood of every choice. Of equal choices the first counts as chosen."""
    right, normed, nats, guessed = [], [], [], []
    for question, likelihood in zip(questions, answers, strict=True):
        guessed.append(1 / len(question.choices) if len(question.choices) > 1 else 0.0)
        if len(question.choices) == 1:
            right.append(float(likelihood[0].greedy))
            nats.append(likelihood[0].nats)
            continue
        sums = [each.nats for each in likelihood]
        characters = [max(1, len(after.removeprefix(" "))) for _, after in question.choices]
        means = [each / length for each, length in zip(sums, characters, strict=True)]
        right.append(float(sums.index(max(sums)) == question.right))
        normed.append(float(means.index(max(means)) == question.right))
    alike = all(len({after for _, after in question.choices}) == 1 for question in questions)
    return Marks(
        questions=len(questions),
        acc=mean(right),
        acc_norm=None if alike else mean(normed),
        perplexity=_perplexity(nats) if nats else None,
        guessing=sum(guessed) / len(guessed),
    )


def mean(values: Sequence[float]) -> Figure:
    """For shares of 0 and 1 the error is the root of p (1 - p) / (n - 1)."""
    count = len(values)
    middle = sum(values) / count
    if count == 1:
        return Figure(middle, None)
    return Figure(middle, math.sqrt(sum((each - middle) ** 2 for each in values) / (count - 1) / count))


def _perplexity(nats: Sequence[float]) -> Figure:
    """The error is that of the mean nats, times the slope of exp."""
    cost = mean([-each for each in nats])
    value = math.exp(min(cost.value, 700.0))  # above, a float has no room for it
    return Figure(value, None if cost.error is None else value * cost.error)
