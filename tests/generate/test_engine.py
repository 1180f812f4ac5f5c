"""Prompts to more tokens: against the model without a cache, against transformers, and at every edge."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from babyllama.errors import InputError, NumericalError, UsageError
from babyllama.generate.engine import Completion, Token, complete, generate
from babyllama.generate.sample import Sampling
from babyllama.model import Llama

GREEDY = Sampling(temperature=0)
LIVELY = Sampling(temperature=1.5, top_k=50, top_p=0.95, min_p=0.01, repetition_penalty=1.2, seed=3)
LENGTHS = (5, 1, 23, 64, 65)
Make = Callable[..., Llama]


def some_prompts(model: Llama, lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(model.config.vocab_size, (n,), generator=generator).tolist() for n in lengths]


def greedy_without_cache(model: Llama, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


def passes_of(model: Llama) -> list[int]:
    """Grows by the width of each forward pass."""
    widths: list[int] = []
    model.register_forward_pre_hook(lambda module, inputs: widths.append(inputs[0].shape[1]))
    return widths


# ---- the right tokens ----------------------------------------------------------------------------


@pytest.mark.parametrize("n_kv_heads", [6, 2], ids=["MHA", "GQA 6/2"])
@pytest.mark.parametrize("prefill_chunk", [1, 3, 7, 64, 256])
def test_a_batch_in_any_chunks_says_what_each_prompt_says_without_a_cache(
    random_llama: Make, n_kv_heads: int, prefill_chunk: int
) -> None:
    model = random_llama(n_kv_heads=n_kv_heads)
    prompts = some_prompts(model)
    found = complete(model, prompts, max_tokens=20, sampling=GREEDY, prefill_chunk=prefill_chunk)
    assert found == [Completion(greedy_without_cache(model, prompt, 20), "length") for prompt in prompts]


@pytest.fixture(scope="module")
def pair(random_llama: Make) -> tuple[Llama, LlamaForCausalLM]:
    """The same random weights in our model and in that of transformers; GQA 6/2, untied."""
    ours = random_llama(n_kv_heads=2)
    c = ours.config
    config = LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.dim,
        intermediate_size=c.hidden_dim,
        num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads,
        max_position_embeddings=c.max_seq_len,
        rms_norm_eps=c.norm_eps,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    names = [
        ("tok_embeddings", "model.embed_tokens"),
        ("lm_head", "lm_head"),
        ("attention_norm", "input_layernorm"),
    ]
    names += [(f"attention.w{x}", f"self_attn.{x}_proj") for x in "qkvo"]
    names += [(f"feed_forward.w_{x}", f"mlp.{x}_proj") for x in ("gate", "up", "down")]
    names += [("ffn_norm", "post_attention_layernorm"), ("layers.", "model.layers.")]
    weights = {}
    for name, weight in ours.state_dict().items():
        for our_part, their_part in names:
            name = name.replace(our_part, their_part)
        weights["model.norm.weight" if name == "norm.weight" else name] = weight
    theirs = LlamaForCausalLM(config).eval()
    theirs.load_state_dict(weights)
    return ours, theirs


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_text_equals_that_of_transformers(pair: tuple[Llama, Any], penalty: float) -> None:
    ours, theirs = pair
    settings = Sampling(temperature=0, repetition_penalty=penalty)
    prompts = some_prompts(ours)
    found = complete(ours, prompts, max_tokens=64, sampling=settings, prefill_chunk=16)
    for prompt, completion in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        expected = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=64,
            repetition_penalty=penalty,
        )  # fmt: skip
        assert completion.ids == expected[0, len(prompt) :].tolist()


def test_the_repetition_penalty_counts_the_prompt_and_the_new_tokens(random_llama: Make) -> None:
    model = random_llama()
    forbidding = Sampling(temperature=0, repetition_penalty=1e9)  # nothing seen can be chosen again
    (completion,) = complete(model, [[5, 6, 7]], max_tokens=80, sampling=forbidding)
    whole = [5, 6, 7, *completion.ids]
    assert len(set(whole)) == len(whole) == 83


def test_ids_beyond_the_tokenizer_are_never_chosen(random_llama: Make) -> None:
    """A model may have more rows than its tokenizer has ids."""
    model = random_llama()
    few = Sampling(temperature=5, repetition_penalty=1.5)
    (completion,) = complete(model, [[1, 9]], max_tokens=60, sampling=few, vocab_size=7)
    assert set(completion.ids) == set(range(7))
    with pytest.raises(UsageError) as caught:
        generate(model, [[1]], max_tokens=1, vocab_size=model.config.vocab_size + 1)
    assert caught.value.where == "vocab_size"


# ---- streaming -----------------------------------------------------------------------------------


def test_streamed_tokens_are_those_of_the_completion_with_their_rows_and_positions(
    random_llama: Make,
) -> None:
    model = random_llama(n_kv_heads=2)
    prompts = some_prompts(model)
    expected = complete(model, prompts, max_tokens=9, sampling=LIVELY)
    streamed = list(generate(model, prompts, max_tokens=9, sampling=LIVELY))
    assert streamed == [
        Token(row, expected[row].ids[step], len(prompt) + step)
        for step in range(9)
        for row, prompt in enumerate(prompts)
    ]


def test_a_token_is_handed_over_before_the_next_one_is_worked_on(random_llama: Make) -> None:
    model = random_llama()
    widths = passes_of(model)
    generation = generate(model, [list(range(10))], max_tokens=5, prefill_chunk=4)
    assert widths == []
    for made in range(5):
        next(generation)
        assert widths == [4, 4, 2] + [1] * made
    assert list(generation) == [] and widths == [4, 4, 2] + [1] * 4, "the last token was worked on in vain"
    assert generation.reasons == ["length"]


def test_gradients_and_modes_of_the_caller_are_untouched_between_tokens(random_llama: Make) -> None:
    for _ in generate(random_llama(), [[1]], max_tokens=3):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("training", [True, False])
def test_the_model_runs_in_eval_mode_and_comes_back_as_it_was(random_llama: Make, training: bool) -> None:
    model = random_llama().train(training)
    modes: list[bool] = []
    model.layers[0].register_forward_pre_hook(lambda module, inputs: modes.append(module.training))
    complete(model, [[1, 2]], max_tokens=3)
    assert model.training is model.layers[0].training is training

    for _ in generate(model, [[1, 2]], max_tokens=3):
        break  # left early
    assert model.training is model.layers[0].training is training

    with torch.no_grad():
        model.norm.weight[0] = torch.nan
    with pytest.raises(NumericalError):
        complete(model, [[1, 2]], max_tokens=3)
    assert model.training is model.layers[0].training is training
    assert len(modes) == 5 and not any(modes)


# ---- ends ----------------------------------------------------------------------------------------


def test_each_of_several_end_tokens_ends_its_row_and_is_left_out(random_llama: Make) -> None:
    model = random_llama(n_kv_heads=2)
    prompts = some_prompts(model)
    free = [completion.ids for completion in complete(model, prompts, max_tokens=30, sampling=GREEDY)]
    stop_ids = {free[0][0], free[1][7], free[3][-1], 96}
    found = complete(model, prompts, max_tokens=30, sampling=GREEDY, stop_ids=stop_ids)
    for ids, completion in zip(free, found, strict=True):
        end = next((at for at, id in enumerate(ids) if id in stop_ids), None)
        assert completion == (Completion(ids, "length") if end is None else Completion(ids[:end], "stop"))
    assert found[0] == Completion([], "stop")
    assert {completion.reason for completion in found} == {"stop", "length"}, (
        "both kinds were meant to be here"
    )


def test_a_row_stopped_from_outside_gives_nothing_more_and_the_others_go_on(random_llama: Make) -> None:
    model = random_llama(n_kv_heads=2)
    prompts = some_prompts(model, (3, 9, 6))
    free = [completion.ids for completion in complete(model, prompts, max_tokens=12, sampling=GREEDY)]
    ids: list[list[int]] = [[], [], []]
    generation = generate(model, prompts, max_tokens=12, sampling=GREEDY)
    for token in generation:
        ids[token.row].append(token.id)
        if token.row == 0 and len(ids[0]) == 4:
            generation.stop(1)  # whose fourth token is chosen already, but not handed over
        if token.row == 2 and len(ids[2]) == 8:
            generation.stop(2)
    assert ids == [free[0], free[1][:3], free[2][:8]]
    assert generation.reasons == ["length", "stop", "stop"]


@pytest.mark.parametrize("length", [1, 29, 31, 32])
def test_generation_ends_exactly_at_the_context(random_llama: Make, length: int) -> None:
    model = random_llama(max_seq_len=32)
    prompt = list(range(length))
    (found,) = complete(model, [prompt], max_tokens=10**9, sampling=GREEDY)
    assert (length + len(found.ids), found.reason) == (32, "length")
    assert found.ids == greedy_without_cache(model, prompt, 32 - length)


def test_rows_that_reach_the_context_wait_there_for_the_others(random_llama: Make) -> None:
    model = random_llama(max_seq_len=32, n_kv_heads=2)
    prompts = some_prompts(model, (32, 3, 31, 17, 30))
    found = complete(model, prompts, max_tokens=20, sampling=GREEDY, prefill_chunk=8)
    room = [0, 20, 1, 15, 2]
    expected = [greedy_without_cache(model, prompt, n) for prompt, n in zip(prompts, room, strict=True)]
    assert found == [Completion(ids, "length") for ids in expected]


def test_max_len_is_a_shorter_context(random_llama: Make) -> None:
    model = random_llama()
    free = greedy_without_cache(model, [1, 2, 3], 7)
    assert complete(model, [[1, 2, 3]], max_tokens=50, max_len=10, sampling=GREEDY)[0].ids == free
    with pytest.raises(InputError, match="prompt 11 tokens, context 10"):
        complete(model, [[1] * 11], max_tokens=1, max_len=10)


def test_no_tokens_asked_for_is_an_empty_result_and_no_work(random_llama: Make) -> None:
    model = random_llama()
    widths = passes_of(model)
    assert complete(model, [[1, 2], [3]], max_tokens=0) == [Completion([], "length")] * 2
    assert complete(model, [], max_tokens=5) == []
    assert widths == []


# ---- what is refused -----------------------------------------------------------------------------


def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers(random_llama: Make) -> None:
    model = random_llama(max_seq_len=32)
    with pytest.raises(InputError, match="prompt 33 tokens, context 32") as caught:
        generate(model, [[1] * 33], max_tokens=1)
    assert (caught.value.code, caught.value.where) == ("E311", "prompt")
    with pytest.raises(InputError) as caught:
        generate(model, [[1], [1] * 32, [1] * 40], max_tokens=1)
    assert (caught.value.code, caught.value.where) == ("E311", "prompt 2")


def test_an_empty_prompt_is_refused_with_the_remedy(random_llama: Make) -> None:
    with pytest.raises(UsageError, match="BOS") as caught:
        generate(random_llama(), [[1], []], max_tokens=1)
    assert (caught.value.code, caught.value.where) == ("E102", "prompt 1")


@pytest.mark.parametrize("stranger", [-1, 97, 2**40])
def test_a_token_that_the_model_does_not_have_is_refused(random_llama: Make, stranger: int) -> None:
    with pytest.raises(InputError, match=f"token {stranger} is not among the 97") as caught:
        generate(random_llama(), [[1, stranger, 2]], max_tokens=1)
    assert caught.value.code == "E309"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("max_tokens", -1), ("max_tokens", True), ("prefill_chunk", 0), ("max_len", 0), ("max_len", 193)],
        *[("streams", [0, 1]), ("streams", [-1]), ("streams", [2**64]), ("streams", [])],
    ],
)
def test_a_number_out_of_range_is_refused_by_name(random_llama: Make, name: str, value: Any) -> None:
    settings: dict[str, Any] = {"max_tokens": 1, name: value}
    with pytest.raises(UsageError) as caught:
        generate(random_llama(), [[1]], **settings)
    assert (caught.value.code, caught.value.where) == ("E102", name)


@pytest.mark.parametrize("sampling", [GREEDY, LIVELY])
def test_a_model_whose_numbers_are_broken_is_found_out_greedy_too(
    random_llama: Make, sampling: Sampling
) -> None:
    model = random_llama()
    generation = generate(model, [[1, 2, 3], [4]], max_tokens=9, sampling=sampling)
    for _ in range(4):
        next(generation)  # two tokens each
    with torch.no_grad():
        model.get_parameter("layers.1.feed_forward.w_up.weight")[0, 0] = torch.nan
    with pytest.raises(NumericalError, match="row 0, token 5") as caught:
        next(generation)
    assert caught.value.code == "E502"


# ---- chance --------------------------------------------------------------------------------------


def test_the_same_seed_tells_the_same_story_and_another_seed_another(random_llama: Make) -> None:
    model = random_llama()
    texts = [complete(model, [[1, 2]], max_tokens=40, sampling=Sampling(seed=seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_equal_prompts_in_one_batch_are_continued_differently(random_llama: Make) -> None:
    found = complete(random_llama(), [[1, 2]] * 4, max_tokens=20)
    assert len({tuple(completion.ids) for completion in found}) == 4


@pytest.mark.parametrize("prefill_chunk", [5, 256])
def test_a_prompt_is_continued_alike_in_any_batch(random_llama: Make, prefill_chunk: int) -> None:
    model = random_llama(n_kv_heads=2)
    prompts = some_prompts(model)
    together = complete(model, prompts, max_tokens=40, sampling=LIVELY)
    backwards = complete(
        model,
        prompts[::-1],
        max_tokens=40,
        sampling=LIVELY,
        streams=[4, 3, 2, 1, 0],
        prefill_chunk=prefill_chunk,
    )
    assert backwards == together[::-1]
    for row, prompt in enumerate(prompts):
        alone = complete(model, [prompt], max_tokens=40, sampling=LIVELY, streams=[row])
        assert alone == [together[row]]


def test_a_text_taken_up_again_goes_on_as_it_would_have(random_llama: Make) -> None:
    model = random_llama()
    (whole,) = complete(model, [[1, 2, 3]], max_tokens=40, sampling=LIVELY)
    for done in (1, 17, 39):
        (rest,) = complete(model, [[1, 2, 3, *whole.ids[:done]]], max_tokens=40 - done, sampling=LIVELY)
        assert rest.ids == whole.ids[done:]


@pytest.mark.cuda
def test_a_gpu_says_what_the_cpu_says(random_llama: Make) -> None:
    model = random_llama(n_kv_heads=2)
    prompts = some_prompts(model)
    on_cpu = complete(model, prompts, max_tokens=30, sampling=GREEDY)
    assert complete(model.to("cuda"), prompts, max_tokens=30, sampling=GREEDY) == on_cpu
