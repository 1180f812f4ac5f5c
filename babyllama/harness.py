"""A model as the lm-eval harness wants it, so that its tasks can be put to it.

    python -m babyllama.harness --model babyllama --model_args path=runs/tales --tasks lambada_openai

That is the harness's own program, which has been told of the model before it starts. Versions of the harness that look
for plugins (`lm_eval.models`, see pyproject.toml) find it by themselves:  lm_eval --model babyllama ...
In Python:  lm_eval.simple_evaluate(model=babyllama.harness.BabyLlamaLM("runs/tales"), tasks=["lambada_openai"])

Importing this needs lm-eval, and nothing of Baby Llama imports it. Raises MachineError E406 without.
Source: [lm-eval] docs/model_guide.md.
"""

import logging
import sys
from collections.abc import Sequence
from typing import Any

from babyllama import machine
from babyllama.api import check_device, load
from babyllama.errors import MachineError, UsageError
from babyllama.generate.engine import generate
from babyllama.generate.sample import Sampling
from babyllama.measure.likelihood import Pair, encode_pairs, likelihoods
from babyllama.text.stream import TextStream

try:
    import lm_eval.models  # noqa: F401  (the others; the harness looks for them only where none is registered yet)
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError as error:
    missing = MachineError("E406", "babyllama.harness", "needs the library lm-eval", "pip install lm_eval")
    if __name__ != "__main__":
        raise missing from error
    from babyllama.terminal import show_error

    show_error(missing)
    sys.exit(missing.exit_status)

NEW_TOKENS = 256  # where a task does not say how many; so many has the harness itself
ROWS_AT_ONCE = 16  # prompts that are continued together


@register_model("babyllama")
class BabyLlamaLM(LM):
    """What the harness asks a model: how likely, how likely all of it, and what comes next.

    path, step, tokenizer  as in babyllama.load.
    device      "cuda:0", "mps" or "cpu". Where there is none of this name it is the CPU, and a warning: "cuda:0" is
                what the harness asks for when nobody said anything. None: the CPU.
    batch_size, max_batch_size  are taken and not needed: batches are made by length and memory.

    A request is of the harness's class Instance: `args` holds what is asked.
    Raises what babyllama.load raises; NumericalError E503 for a device that computes wrong numbers.
    """

    def __init__(
        self,
        path: str,
        step: int | None = None,
        tokenizer: str | None = None,
        device: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        device = device or "cpu"
        if not machine.has_device(device):
            logging.getLogger(__name__).warning("no device %s here: on the CPU", device)
            device = "cpu"
        check_device(device)
        self._llama = load(path, step=step, tokenizer=tokenizer)
        self._llama.model.to(device).eval()

    @property
    def tokenizer_name(self) -> str:
        """Under which the harness keeps prompts that it has made."""
        return f"babyllama-{self._llama.tokenizer.sha256}"

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(nats, greedy) of each (context, continuation)."""
        pairs = encode_pairs(self._llama.tokenizer, [request.args for request in requests])
        return self._answered(
            "loglikelihood", requests, [*map(tuple, self._likelihoods(pairs, disable_tqdm))]
        )

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Nats of each text behind one BOS, in windows as long as the context."""
        tokenizer = self._llama.tokenizer
        texts = tokenizer.encode_batch([request.args[0] for request in requests])
        found = self._likelihoods([Pair([tokenizer.bos_id], ids) for ids in texts], disable_tqdm)
        return self._answered("loglikelihood_rolling", requests, [each.nats for each in found])

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What follows each prompt, up to one of the texts in `until`; greedy unless a temperature is asked for.

        A prompt is cut from the left to leave room for the new tokens, but at most by half of the context.

        Raises UsageError E101 for an option that is not known here.
        """
        texts = [""] * len(requests)
        options = [_Options(request.args[1]) for request in requests]
        order = sorted(range(len(requests)), key=lambda number: options[number].key)
        while order:
            first = options[order[0]]
            batch = [number for number in order[:ROWS_AT_ONCE] if options[number].key == first.key]
            order = order[len(batch) :]
            made = self._continued([requests[number].args[0] for number in batch], first)
            for number, text in zip(batch, made, strict=True):
                texts[number] = text
        return self._answered("generate_until", requests, texts)

    def _continued(self, prompts: list[str], options: "_Options") -> list[str]:
        tokenizer, context = self._llama.tokenizer, self._llama.config.max_seq_len
        room = max(context - options.max_tokens, context // 2, 1)
        beginning = [tokenizer.bos_id] if tokenizer.puts_bos else []
        ids = [(beginning + each)[-room:] or [tokenizer.bos_id] for each in tokenizer.encode_batch(prompts)]
        generation = generate(
            self._llama.model,
            ids,
            max_tokens=options.max_tokens,
            sampling=options.sampling,
            stop_ids=tokenizer.eos_ids,
            vocab_size=tokenizer.vocab_size,
        )
        streams = [TextStream(tokenizer, options.until) for _ in prompts]
        texts = [""] * len(prompts)
        for token in generation:
            texts[token.row] += streams[token.row].push(token.id)
            if streams[token.row].stopped:
                generation.stop(token.row)
        return [text + stream.flush() for text, stream in zip(texts, streams, strict=True)]

    def _likelihoods(self, pairs: list[Pair], quiet: bool) -> Any:
        from tqdm import tqdm  # the harness's own bar

        with tqdm(total=len(pairs), disable=quiet, desc="Running requests") as bar:

            def progress(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            return likelihoods(self._llama.model, pairs, progress)

    def _answered(self, kind: str, requests: Sequence[Any], answers: list[Any]) -> list[Any]:
        """The answers, after the harness's cache has been told of them."""
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial(kind, request.args, answer)
        return answers


class _Options:
    """The options of a task's generation, in this project's words. Raises UsageError E101."""

    def __init__(self, given: dict[str, Any]) -> None:
        left = dict(given)
        until = left.pop("until", None) or []
        self.until = (until,) if isinstance(until, str) else tuple(each for each in until if each)
        lengths = [left.pop(name, None) for name in ("max_gen_toks", "max_new_tokens", "max_tokens")]
        self.max_tokens = int(next((each for each in lengths if each is not None), NEW_TOKENS))
        temperature = float(left.pop("temperature", 0.0) or 0.0)
        if not left.pop("do_sample", temperature > 0):
            temperature = 0.0
        elif temperature == 0:
            temperature = 1.0
        names = ("top_k", "top_p", "min_p", "repetition_penalty", "seed")
        self.sampling = Sampling(
            temperature=temperature, **{name: left.pop(name) for name in names if left.get(name) is not None}
        )
        left = {name: value for name, value in left.items() if value is not None}
        if left:
            found = f"options not known here: {', '.join(map(str, left))}"
            fix = f"leave them out; there are until, max_gen_toks, temperature, do_sample, {', '.join(names)}"
            raise UsageError("E101", "generate_until", found, fix)
        self.key = repr((self.until, self.max_tokens, self.sampling))


if __name__ == "__main__":
    cli_evaluate()
