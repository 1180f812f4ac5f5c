"""Puts known mistakes back, one at a time, and shows that a test notices each.

    python tests/mutants.py               every mutant, as a Markdown table
    python tests/mutants.py --only RoPE   those whose name contains "RoPE"

A mutant is one line of MUTANTS: its name, the file, the text that is replaced (which must stand there exactly
once), what it is replaced with, and the tests of which at least one must fail. Each runs in a copy of the
repository in a temporary folder. Exit status 1: a mutant survived, or its text is no longer found once.
S1 to S12 are defects of the teaching implementation that this project grew from.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Mutant(NamedTuple):
    name: str
    file: str  # under babyllama/
    old: str
    new: str
    tests: str  # under tests/, parted by spaces: FILE, or FILE::TEST


MODEL, ORACLE = "test_model.py::", "test_model_oracle.py::"
PARITY = ORACLE + "test_logits_and_every_gradient_equal_transformers"
TAPS = MODEL + "test_what_a_tap_returns_is_used_from_there_on"
SPREAD = MODEL + "test_each_new_parameter_has_the_spread_that_its_name_asks_for"
REFUSED = MODEL + "test_an_impossible_size_is_refused_by_its_name"
LOOP, OPTIM, RECIPE, EVALUATE = (
    f"train/test_{name}.py::" for name in ("loop", "optim", "recipe", "evaluate")
)
FOLDER, API = "checkpoint/test_folder.py::", "test_api.py::"
NAMED = API + "test_a_step_gets_its_name_only_when_all_of_it_is_on_the_disk"
RESUMED = LOOP + "test_an_interrupted_run_ends_with_the_same_bits"
SCORED = EVALUATE + "test_bits_per_byte_are_those_of_one_pass_for_each_token"
HF = "checkpoint/test_hf.py::test_a_saved_model_opens_in_transformers_with_the_same_ids_and_logits"

# fmt: off
MUTANTS = [
    # ---- the defects of the first implementation -----------------------------------------------------
    Mutant("S1 RoPE keeps the diagonal only: no sines", "model.py",
           "(first * cos - second * sin, second * cos + first * sin)", "(first * cos, second * cos)",
           MODEL + "test_rotation_keeps_the_length_of_every_pair"),
    Mutant("S2 attention without its output matrix", "model.py",
           'tap("output", self.wo(heads.transpose(1, 2).reshape(B, T, -1)))',
           'tap("output", heads.transpose(1, 2).reshape(B, T, -1)[..., : x.shape[-1]])',
           MODEL + "test_each_shown_value_follows_from_those_before_it"),
    Mutant("S3 one norm for both branches", "model.py",
           "self.ffn_norm = RMSNorm(config.dim, config.norm_eps)", "self.ffn_norm = self.attention_norm",
           MODEL + "test_gains_of_the_two_norms_of_a_block_are_two"),
    Mutant("S4 no norm before the head", "model.py",
           'self.norm(tap("norm.input", x))', 'tap("norm.input", x)',
           MODEL + "test_each_shown_value_follows_from_those_before_it"),
    Mutant("S4 a head with a bias", "model.py",
           "nn.Linear(config.dim, config.vocab_size, bias=False)", "nn.Linear(config.dim, config.vocab_size)",
           MODEL + "test_parameters_have_their_names_and_shapes_and_nothing_else_is_stored"),
    Mutant("S5 square matrices inside SwiGLU", "model.py",
           "self.w_up = nn.Linear(config.dim, config.hidden_dim, bias=False)",
           "self.w_up = nn.Sequential(nn.Linear(config.dim, config.hidden_dim, bias=False),"
           " nn.Linear(config.hidden_dim, config.hidden_dim, bias=False))",
           MODEL + "test_parameters_have_their_names_and_shapes_and_nothing_else_is_stored"),
    Mutant("S5 Swish with another beta", "model.py",
           "F.silu(gate) * up", "gate * torch.sigmoid(1.5 * gate) * up",
           MODEL + "test_each_shown_value_follows_from_those_before_it"),
    Mutant("S6 RMSNorm in the type of its input", "model.py",
           "x32 = x.float()", "x32 = x",
           MODEL + "test_rmsnorm_computes_in_float32_whatever_comes_in"),
    Mutant("S7 every layer makes its own mask", "model.py",
           "x = layer(x, call,", "x = layer(x, call._replace(mask=mask if mask is None else mask.clone()),",
           MODEL + "test_all_layers_share_one_mask_and_one_table_and_the_fused_pass_makes_no_mask"),
    Mutant("S7 RoPE's table as a plain attribute", "model.py",
           "        self.config = config\n        with torch",
           "        self.config = config\n        self.table = rope_frequencies(config)\n        with torch",
           MODEL + "test_parameters_have_their_names_and_shapes_and_nothing_else_is_stored"),
    Mutant("S8 top-p drops the token that crosses p", "generate/sample.py",
           "ordered[before >= sampling.top_p] = 0", "ordered[ordered.cumsum(axis=1) > sampling.top_p] = 0",
           "generate/test_sample.py::test_top_p_keeps_the_token_that_crosses_it"),
    Mutant("S8 top-p keeps at least one token of the whole batch, not of each row", "generate/sample.py",
           "ordered[before >= sampling.top_p] = 0",
           "drop = ordered.cumsum(axis=1) > sampling.top_p\n        drop[0, 0] &= not drop.all()\n"
           "        ordered[drop] = 0",
           "generate/test_sample.py::test_top_p_is_of_each_row_by_itself"),
    Mutant("S9 no cache: a token sees the newest ones only", "generate/engine.py",
           "model(tokens, cache)", "model(tokens)",
           "generate/test_engine.py::test_a_batch_in_any_chunks_says_what_each_prompt_says_without_a_cache"),
    Mutant("S9 the prompt is not read, only its length", "generate/engine.py",
           "prompt if reason is None else []", "[0] * len(prompt) if reason is None else []",
           "generate/test_engine.py::test_a_batch_in_any_chunks_says_what_each_prompt_says_without_a_cache"),
    Mutant("S9 all rows of a batch begin with the first prompt", "generate/engine.py",
           "prompt if reason is None else []", "(prompts[0] * 99)[: len(prompt)] if reason is None else []",
           "generate/test_engine.py::test_a_batch_in_any_chunks_says_what_each_prompt_says_without_a_cache"),
    Mutant("S9 a cache that writes one slot too far", "generate/cache.py",
           "slots = self.lengths[:, None] + torch", "slots = 1 + self.lengths[:, None] + torch",
           "generate/test_cache.py::test_rows_of_different_lengths_give_the_logits_of_each_alone"),
    Mutant("S10 the tail of a text is lost", "data/batches.py",
           "self.windows = -(-self.targets // context)", "self.windows = self.targets // context",
           "data/test_batches.py::test_every_token_but_the_first_is_a_target_exactly_once_per_epoch"),
    Mutant("S10 padding counts as text", "data/batches.py",
           "targets[index >= self.targets] = IGNORE", "pass",
           "data/test_batches.py::test_missing_targets_only_end_the_last_window_of_an_epoch"),
    Mutant("S10 documents are cut to one length", "data/corpus.py",
           "for id in (tokenizer.bos_id, *document, tokenizer.eos_id)",
           "for id in (tokenizer.bos_id, *document[:20], tokenizer.eos_id)",
           "data/test_corpus.py::test_every_document_is_on_one_side_whole_with_its_ends"),
    Mutant("S11 the split is drawn anew each time", "data/corpus.py",
           "cls(seed=seed), 0", 'cls(seed=__import__("random").getrandbits(32)), 0',
           "data/test_corpus.py::test_the_split_is_stable_and_another_seed_gives_another"),
    Mutant("S11 validation texts are trained on as well", "data/corpus.py",
           "waiting[name].append(document.text)",
           'waiting["train"].append(document.text)\n            if name == "val":\n'
           '                waiting["val"].append(document.text)',
           "data/test_corpus.py::test_documents_of_validation_never_occur_in_training"),
    Mutant("S11 the tokenizer is trained on the validation side too", "data/corpus.py",
           "if key not in validation and int", "if int",
           "data/test_corpus.py::test_the_tokenizer_never_saw_the_validation_side"),
    Mutant("S12 the vocabulary is not chosen by the size of the text", "data/corpus.py",
           "return next((size for limit, size in steps if bytes < limit), 16384)", "return 30_000",
           "data/test_corpus.py::test_the_vocabulary_follows_the_size_of_the_text"),
    Mutant("S12 the vocabulary is as large as the library likes", "text/tokenizer.py",
           "vocab_size=vocab_size,\n            min_frequency=2,", "vocab_size=30_000,\n            min_frequency=2,",
           "text/test_tokenizer.py::test_too_small_a_vocabulary_is_e304"),
    Mutant("S12 the ids of BOS and EOS are written into the code", "text/tokenizer.py",
           "self.bos_id, self.eos_id, self.eos_ids = _ends(files, vocab, self.vocab_size, where)",
           "self.bos_id, self.eos_id, self.eos_ids = 2, 3, frozenset({3})",
           "text/test_tokenizer.py::test_control_tokens_come_first"),

    # ---- sizes -----------------------------------------------------------------------------------
    Mutant("hidden width without the 2/3", "model.py",
           "int(2 * 4 * dim / 3)", "4 * dim", MODEL + "test_hidden_width_is_that_of_the_released_models"),
    Mutant("hidden width rounded down", "model.py",
           "math.ceil(int(ffn_dim_multiplier", "math.floor(int(ffn_dim_multiplier",
           MODEL + "test_hidden_width_is_that_of_the_released_models"),
    Mutant("hidden width multiplied before the 2/3 is rounded", "model.py",
           "int(ffn_dim_multiplier * int(2 * 4 * dim / 3))", "int(2 * 4 * dim / 3)",
           MODEL + "test_hidden_width_is_that_of_the_released_models"),
    Mutant("head_dim is always dim / n_heads", "model.py",
           "self.head_dim or self.dim // max(self.n_heads, 1)", "self.dim // max(self.n_heads, 1)",
           MODEL + "test_a_zero_means_derive_and_every_field_then_holds_its_value"),
    Mutant("key heads that do not divide are let through", "model.py",
           "fits = self.n_heads % self.n_kv_heads == 0", "fits = self.n_heads >= self.n_kv_heads", REFUSED),
    Mutant("an odd head_dim is let through", "model.py", "self.head_dim % 2 == 0, ", "True, ", REFUSED),
    Mutant("sizes that are not a number are let through", "model.py",
           "0 < value < math.inf, ", "not value <= 0, ", REFUSED),
    Mutant("a config can be changed", "model.py",
           '@dataclass(frozen=True, kw_only=True)\nclass Config:', '@dataclass(kw_only=True)\nclass Config:',
           MODEL + "test_the_sizes_of_a_config_cannot_be_changed"),

    # ---- RMSNorm ---------------------------------------------------------------------------------
    Mutant("RMSNorm over the sequence", "model.py",
           "x32.pow(2).mean(-1, keepdim=True)", "x32.pow(2).mean((-2, -1), keepdim=True)",
           MODEL + "test_rmsnorm_treats_each_token_by_itself"),
    Mutant("RMSNorm: eps outside of the root", "model.py",
           "torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)",
           "(1 / (x32.pow(2).mean(-1, keepdim=True).sqrt() + self.eps))",
           MODEL + "test_eps_of_rmsnorm_is_added_to_the_mean_square_inside_the_root"),
    Mutant("RMSNorm: eps is always 1e-5", "model.py", "self.eps = eps", "self.eps = 1e-5", PARITY),
    Mutant("RMSNorm: gain before the rounding", "model.py",
           "self.weight * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)",
           "(self.weight * x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)",
           ORACLE + "test_rmsnorm_equals_transformers_bit_for_bit"),
    Mutant("RMSNorm subtracts the mean", "model.py",
           "x32 = x.float()", "x32 = x.float() - x.float().mean(-1, keepdim=True)",
           MODEL + "test_rmsnorm_does_not_subtract_the_mean"),
    Mutant("RMSNorm without its gain", "model.py",
           "return self.weight * (x32", "return (x32", MODEL + "test_rmsnorm_is_its_formula"),

    # ---- RoPE ------------------------------------------------------------------------------------
    Mutant("RoPE turns the wrong way", "model.py",
           "(first * cos - second * sin, second * cos + first * sin)",
           "(first * cos + second * sin, second * cos - first * sin)",
           MODEL + "test_rotation_is_multiplication_by_a_complex_number"),
    Mutant("RoPE: one sign wrong", "model.py",
           "(first * cos - second * sin, second * cos + first * sin)",
           "(first * cos + second * sin, second * cos + first * sin)",
           MODEL + "test_score_of_rotated_vectors_depends_on_their_distance_only"),
    Mutant("RoPE: pairs are neighbours", "model.py",
           "first, second = x.float().chunk(2, dim=-1)\n"
           "    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)",
           "first, second = x.float()[..., ::2], x.float()[..., 1::2]\n"
           "    return torch.stack((first * cos - second * sin, second * cos + first * sin), -1).flatten(-2)"
           ".to(x.dtype)", PARITY),
    Mutant("RoPE: theta is always 10000", "model.py", "1.0 / config.rope_theta **", "1.0 / 10000.0 **", PARITY),
    Mutant("RoPE: frequencies by half the width", "model.py",
           ".float() / config.head_dim)", ".float() * 2 / config.head_dim)",
           MODEL + "test_frequencies_fall_from_one_to_nearly_one_over_theta"),
    Mutant("RoPE scaling ignored", "model.py",
           "scaling = config.rope_scaling", "scaling = None", PARITY),
    Mutant("RoPE: linear scaling multiplies", "model.py",
           "return frequencies / scaling.factor\n", "return frequencies * scaling.factor\n",
           MODEL + "test_linear_scaling_reads_position_p_as_p_over_factor"),
    Mutant("RoPE: linear instead of llama3", "model.py",
           'if scaling.kind == "linear":', "if scaling.kind:",
           MODEL + "test_llama3_scaling_keeps_fast_pairs_and_divides_slow_ones"),
    Mutant("RoPE: llama3's factor is always 8", "model.py",
           "(1 - keep) * frequencies / scaling.factor", "(1 - keep) * frequencies / 8",
           ORACLE + "test_llama3_frequencies_equal_transformers_bit_for_bit"),
    Mutant("RoPE: llama3's borders are always 1 and 4", "model.py",
           "low, high = scaling.low_freq_factor, scaling.high_freq_factor", "low, high = 1.0, 4.0",
           MODEL + "test_llama3_scaling_keeps_fast_pairs_and_divides_slow_ones"),
    Mutant("RoPE: llama3's original context is always 8192", "model.py",
           "turns = scaling.original_max_seq_len", "turns = 8192",
           MODEL + "test_llama3_scaling_keeps_fast_pairs_and_divides_slow_ones"),
    Mutant("RoPE: llama3's blend is a step", "model.py",
           "keep = ((turns - low) / (high - low)).clamp(0, 1)", "keep = (turns > low).float()",
           ORACLE + "test_llama3_frequencies_equal_transformers_bit_for_bit"),
    Mutant("RoPE: tables in bfloat16", "model.py",
           "return angles.cos(), angles.sin()", "return angles.bfloat16().cos(), angles.bfloat16().sin()",
           MODEL + "test_tables_stay_right_at_position_100000_when_the_model_is_bfloat16"),
    Mutant("RoPE: frequencies in bfloat16", "model.py",
           "rope_frequencies(config).to(positions.device)",
           "rope_frequencies(config).to(positions.device).bfloat16().float()",
           MODEL + "test_tables_stay_right_at_position_100000_when_the_model_is_bfloat16"),
    Mutant("RoPE: positions in bfloat16", "model.py",
           "positions[..., None].float()", "positions[..., None].bfloat16().float()",
           ORACLE + "test_cos_and_sin_equal_transformers_bit_for_bit"),
    Mutant("RoPE: rotated in the type of q", "model.py",
           "first, second = x.float().chunk(2, dim=-1)",
           "cos, sin, (first, second) = cos.to(x.dtype), sin.to(x.dtype), x.chunk(2, dim=-1)",
           MODEL + "test_rotation_adds_one_rounding_only"),
    Mutant("RoPE: frequencies follow the default type", "model.py",
           "torch.arange(0, config.head_dim, 2).float() / config.head_dim",
           "torch.arange(0, config.head_dim, 2) / config.head_dim",
           MODEL + "test_frequencies_are_float32_whatever_the_default_type_is"),
    Mutant("RoPE: the key is not rotated", "model.py",
           'tap("k_rotated", rotate(k, call.rope))', 'tap("k_rotated", k)', PARITY),
    Mutant("RoPE: values are rotated too", "model.py",
           "call.attention(q, k, v, call.mask, tap)",
           "call.attention(q, k, rotate(v, call.rope), call.mask, tap)", PARITY),
    Mutant("positions ignore the cache", "model.py",
           "positions = start[:, None] + torch", "positions = 0 * start[:, None] + torch",
           MODEL + "test_tokens_given_in_chunks_through_a_cache_give_the_logits_of_one_pass"),
    Mutant("positions after a cache are one too small", "model.py",
           "rope_tables(self.config, positions)", "rope_tables(self.config, positions - (cache is not None))",
           MODEL + "test_tables_stay_right_at_position_100000_when_the_model_is_bfloat16"),
    Mutant("positions of the longest row for all rows", "model.py",
           "positions = start[:, None]", "positions = 0 * start[:, None] + start.max()",
           MODEL + "test_rows_of_different_length_in_a_cache_are_as_if_each_were_alone"),

    # ---- attention -------------------------------------------------------------------------------
    Mutant("a token does not see itself", "model.py",
           "slots <= positions[..., None]", "slots < positions[..., None]",
           MODEL + "test_masked_scores_are_minus_infinity_exactly_above_the_diagonal_and_weights_sum_to_one"),
    Mutant("a token sees the next one", "model.py",
           "slots <= positions[..., None]", "slots <= positions[..., None] + 1",
           MODEL + "test_later_tokens_do_not_change_earlier_logits"),
    Mutant("a token sees later ones", "model.py",
           "slots <= positions[..., None]", "slots >= positions[..., None]",
           MODEL + "test_later_tokens_do_not_change_earlier_logits"),
    Mutant("the mask begins at the upper left corner", "model.py",
           "slots <= positions[..., None]", "slots <= torch.arange(T)[None, :, None]",
           MODEL + "test_tokens_given_in_chunks_through_a_cache_give_the_logits_of_one_pass"),
    Mutant("the fused mask begins at the upper left corner", "model.py",
           "attn_mask=mask, is_causal=mask is None", "attn_mask=None, is_causal=True",
           MODEL + "test_tokens_given_in_chunks_through_a_cache_give_the_logits_of_one_pass"),
    Mutant("the fused pass is not causal", "model.py",
           "is_causal=mask is None", "is_causal=False", MODEL + "test_later_tokens_do_not_change_earlier_logits"),
    Mutant("a mask where none is needed", "model.py",
           "if cache is not None or not fused:", "if True:",
           MODEL + "test_all_layers_share_one_mask_and_one_table_and_the_fused_pass_makes_no_mask"),
    Mutant("masked scores are a large number, not infinity", "model.py",
           "scores.masked_fill(~mask, -math.inf)", "scores - 1e4 * ~mask",
           MODEL + "test_masked_scores_are_minus_infinity_exactly_above_the_diagonal_and_weights_sum_to_one"),
    Mutant("scores without 1 / √head_dim", "model.py",
           "q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])", "q @ k.transpose(-2, -1)", PARITY),
    Mutant("scores divided by √dim", "model.py",
           "/ math.sqrt(q.shape[-1])", "/ math.sqrt(q.shape[-1] * q.shape[1])",
           MODEL + "test_attention_is_its_formula_with_query_heads_sharing_in_groups"),
    Mutant("softmax over the queries", "model.py",
           "scores.float().softmax(dim=-1)", "scores.float().softmax(dim=-2).nan_to_num()",
           MODEL + "test_masked_scores_are_minus_infinity_exactly_above_the_diagonal_and_weights_sum_to_one"),
    Mutant("softmax by hand, in the type of the model", "model.py",
           "scores.float().softmax(dim=-1)",
           "F.normalize((scores - scores.amax(-1, keepdim=True)).exp(), p=1.0, dim=-1)",
           MODEL + "test_softmax_is_computed_in_float32"),
    Mutant("GQA: keys repeated in the wrong order", "model.py",
           "k.repeat_interleave(sharing, dim=1), v.repeat_interleave(sharing, dim=1)",
           "k.repeat(1, sharing, 1, 1), v.repeat(1, sharing, 1, 1)",
           MODEL + "test_attention_is_its_formula_with_query_heads_sharing_in_groups"),
    Mutant("GQA: values repeated in the wrong order", "model.py",
           "v.repeat_interleave(sharing, dim=1)", "v.repeat(1, sharing, 1, 1)", PARITY),
    Mutant("k is cut into heads as if there were n_heads of them", "model.py",
           'k = tap("k", self.wk(x).view(B, T, -1, self.head_dim).transpose(1, 2))',
           'k = tap("k", self.wk(x).view(B, T, self.head_dim, -1).permute(0, 3, 1, 2))',
           MODEL + "test_each_shown_value_follows_from_those_before_it"),
    Mutant("heads are mixed up with dimensions when they are merged", "model.py",
           "self.wo(heads.transpose(1, 2).reshape(B, T, -1))", "self.wo(heads.permute(0, 2, 3, 1).reshape(B, T, -1))",
           MODEL + "test_each_shown_value_follows_from_those_before_it"),
    Mutant("heads are merged without being moved back", "model.py",
           "self.wo(heads.transpose(1, 2).reshape(B, T, -1))", "self.wo(heads.reshape(B, T, -1))",
           MODEL + "test_later_tokens_do_not_change_earlier_logits"),
    Mutant("the cache is not used", "model.py",
           "if call.cache is not None:", "if call.cache is not None and T > 1:",
           MODEL + "test_tokens_given_in_chunks_through_a_cache_give_the_logits_of_one_pass"),
    Mutant("every layer writes to the cache of the first", "model.py",
           "call.cache.append(self.layer, k, v)", "call.cache.append(0, k, v)",
           MODEL + "test_tokens_given_in_chunks_through_a_cache_give_the_logits_of_one_pass"),
    Mutant("keys are stored before they are rotated", "model.py",
           '        q, k = tap("q_rotated", rotate(q, call.rope)), tap("k_rotated", rotate(k, call.rope))\n'
           "        if call.cache is not None:\n"
           "            k, v = call.cache.append(self.layer, k, v)  # (B, K, S, hd): of all tokens so far\n",
           "        raw = k\n"
           '        q, k = tap("q_rotated", rotate(q, call.rope)), tap("k_rotated", rotate(k, call.rope))\n'
           "        if call.cache is not None:\n"
           "            k, v = call.cache.append(self.layer, raw, v)\n",
           MODEL + "test_tokens_given_in_chunks_through_a_cache_give_the_logits_of_one_pass"),

    # ---- SwiGLU and the whole --------------------------------------------------------------------
    Mutant("gate and up swapped", "model.py", "F.silu(gate) * up", "F.silu(up) * gate", PARITY),
    Mutant("GELU instead of SiLU", "model.py", "F.silu(gate)", "F.gelu(gate)", PARITY),
    Mutant("no gate", "model.py", "F.silu(gate) * up", "F.silu(gate)",
           MODEL + "test_each_shown_value_follows_from_those_before_it"),
    Mutant("the two norms of a block swapped", "model.py",
           "        self.attention_norm = RMSNorm(config.dim, config.norm_eps)\n"
           "        self.attention = Attention(config, layer)\n"
           "        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)\n"
           "        self.feed_forward = FeedForward(config)\n\n"
           '    def forward(self, x: Float[Tensor, "B T D"], call: Call, tap: Tap) -> Float[Tensor, "B T D"]:\n'
           '        normed = tap("attention_norm.output", self.attention_norm(tap("attention_norm.input", x)))',
           "        self.attention_norm = RMSNorm(config.dim, config.norm_eps)\n"
           "        self.attention = Attention(config, layer)\n"
           "        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)\n"
           "        self.feed_forward = FeedForward(config)\n\n"
           '    def forward(self, x: Float[Tensor, "B T D"], call: Call, tap: Tap) -> Float[Tensor, "B T D"]:\n'
           '        normed = tap("attention_norm.output", self.ffn_norm(tap("attention_norm.input", x)))',
           PARITY),
    Mutant("no residual around attention", "model.py",
           "x + self.attention(normed", "self.attention(normed",
           MODEL + "test_each_shown_value_follows_from_those_before_it"),
    Mutant("no residual around the feed-forward", "model.py",
           "x + self.feed_forward(normed", "self.feed_forward(normed",
           MODEL + "test_each_shown_value_follows_from_those_before_it"),
    Mutant("the residual stream holds the normed vector", "model.py",
           'tap("after_attention", x + ', 'tap("after_attention", normed + ', PARITY),
    Mutant("attention reads the stream without its norm", "model.py",
           "x + self.attention(normed, call", "x + self.attention(x, call", PARITY),
    Mutant("one layer is left out", "model.py",
           "in enumerate(self.layers):", "in enumerate(self.layers[1:]):", PARITY),
    Mutant("a tied model makes its own head all the same", "model.py",
           "if not config.tie_embeddings:", "if True:",
           MODEL + "test_a_tied_model_uses_its_embedding_twice_and_has_it_once"),
    Mutant("the head is always the embedding", "model.py",
           "head = self.tok_embeddings.weight if self.lm_head is None else self.lm_head.weight",
           "head = self.tok_embeddings.weight",
           MODEL + "test_a_tied_model_uses_its_embedding_twice_and_has_it_once"),
    Mutant("embeddings multiplied by √dim", "model.py",
           "self.tok_embeddings(tokens))", "self.tok_embeddings(tokens) * self.config.dim**0.5)", PARITY),

    # ---- initialisation --------------------------------------------------------------------------
    Mutant("w_up is zero instead of w_down", "model.py",
           '"feed_forward.w_down.weight")):', '"feed_forward.w_up.weight")):', SPREAD),
    Mutant("wo is not zero", "model.py",
           '("attention.wo.weight", "feed_forward.w_down.weight")', '("feed_forward.w_down.weight",)', SPREAD),
    Mutant("spread by the rows instead of the columns", "model.py", "shape[1] ** -0.5", "shape[0] ** -0.5", SPREAD),
    Mutant("a box instead of a bell", "model.py",
           "weight.normal_(0.0, init_std(name, weight.shape), generator=generator)",
           "weight.uniform_(-1.0, 1.0, generator=generator).mul_(3**0.5 * init_std(name, weight.shape))", SPREAD),
    Mutant("gains are random", "model.py",
           'if name.endswith("norm.weight"):', 'if name.endswith("no such weight"):', SPREAD),
    Mutant("the vocabulary's matrices are spread as the others", "model.py",
           "return min(0.02, 2 / shape[1])", "return shape[1] ** -0.5",
           MODEL + "test_loss_of_a_new_model_is_that_of_knowing_nothing"),
    Mutant("a wide vocabulary matrix is spread as a narrow one", "model.py",
           "return min(0.02, 2 / shape[1])", "return 0.02",
           MODEL + "test_loss_of_a_new_model_is_that_of_knowing_nothing"),
    Mutant("making a model draws from the global random numbers", "model.py",
           "with torch.random.fork_rng(devices=[]):", "if True:",
           MODEL + "test_making_a_model_leaves_the_global_random_numbers_alone"),
    Mutant("a scaling of factor 0 is let through", "model.py",
           '"must be linear or llama3")\n        _require_positive(self)\n', '"must be linear or llama3")\n',
           MODEL + "test_an_impossible_scaling_is_refused_by_its_name"),
    Mutant("the seed is ignored", "model.py",
           "torch.Generator().manual_seed(seed)", "torch.Generator().manual_seed(0)",
           MODEL + "test_a_new_model_is_a_function_of_its_seed_and_sizes_only"),
    Mutant("initialised from the global generator", "model.py",
           "init_std(name, weight.shape), generator=generator)", "init_std(name, weight.shape))",
           MODEL + "test_a_new_model_is_a_function_of_its_seed_and_sizes_only"),

    # ---- taps ------------------------------------------------------------------------------------
    Mutant("tap: a new embedding is ignored", "model.py",
           'x = tap("embeddings", self.tok_embeddings(tokens))',
           'tap("embeddings", x := self.tok_embeddings(tokens))', TAPS),
    Mutant("tap: a new input of a norm is ignored", "model.py",
           'self.attention_norm(tap("attention_norm.input", x))',
           'self.attention_norm((tap("attention_norm.input", x), x)[1])', TAPS),
    Mutant("tap: a new output of a norm is ignored", "model.py",
           'normed = tap("ffn_norm.output", self.ffn_norm(tap("ffn_norm.input", x)))',
           'tap("ffn_norm.output", normed := self.ffn_norm(tap("ffn_norm.input", x)))', TAPS),
    Mutant("tap: a new q is ignored", "model.py",
           'q, k = tap("q_rotated", rotate(q, call.rope)),', 'q, k = (tap("q_rotated", q), rotate(q, call.rope))[1],',
           TAPS),
    Mutant("tap: a new score is ignored", "model.py",
           'scores = tap("scores", q @ k', 'tap("scores", scores := q @ k', TAPS),
    Mutant("tap: a new masked score is ignored", "model.py",
           'scores = tap("masked_scores", scores.masked_fill(~mask, -math.inf))',
           'tap("masked_scores", scores := scores.masked_fill(~mask, -math.inf))', TAPS),
    Mutant("tap: a new weight is ignored", "model.py",
           'weights = tap("weights", scores', 'tap("weights", weights := scores', TAPS),
    Mutant("tap: a new output of the heads is ignored", "model.py",
           'heads = tap("heads", call', 'tap("heads", heads := call', TAPS),
    Mutant("tap: a new gate is ignored", "model.py",
           'gate, up = tap("gate", self.w_gate(x)),', 'gate, up = (tap("gate", self.w_gate(x)), self.w_gate(x))[1],',
           TAPS),
    Mutant("tap: a new product is ignored", "model.py",
           'self.w_down(tap("product", F.silu(gate) * up))',
           'self.w_down((tap("product", F.silu(gate) * up), F.silu(gate) * up)[1])', TAPS),
    Mutant("tap: a new output of a branch is ignored", "model.py",
           'return tap("output", self.w_down(tap("product", F.silu(gate) * up)))',
           'tap("output", y := self.w_down(tap("product", F.silu(gate) * up)))\n        return y', TAPS),
    Mutant("tap: a new residual stream is ignored", "model.py",
           'x = tap("after_attention", x', 'tap("after_attention", x := x', TAPS),
    Mutant("tap: new logits are ignored", "model.py",
           'return tap("logits", F.linear(x, head))', 'tap("logits", y := F.linear(x, head))\n        return y', TAPS),
    Mutant("tap: the layer is not in the name", "model.py",
           'inside(tap, f"layers.{i}")', 'inside(tap, "layers.0")',
           MODEL + "test_a_pass_shows_the_names_that_are_listed_in_their_order_with_their_shapes"),
    Mutant("tap: two names of the list swapped", "model.py",
           '"attention.scores", "attention.masked_scores",', '"attention.masked_scores", "attention.scores",',
           MODEL + "test_a_pass_shows_the_names_that_are_listed_in_their_order_with_their_shapes"),
    Mutant("tap: with a tap the fused pass runs", "model.py",
           "fused and tap is no_tap", "fused",
           MODEL + "test_a_pass_shows_the_names_that_are_listed_in_their_order_with_their_shapes"),

    # ---- training --------------------------------------------------------------------------------
    Mutant("train: a mean of means", "train/loop.py",
           "part = loss_sum(self.logits(some), wanted) / counted",
           "part = loss_sum(self.logits(some), wanted) / (wanted != IGNORE).sum() / self.plan.accumulation",
           LOOP + "test_accumulated_gradients_are_those_of_the_whole_batch_with_ragged_targets"),
    Mutant("train: a step's loss is divided by all targets, missing ones too", "train/loop.py",
           "counted = int((targets != IGNORE).sum())", "counted = targets.numel()",
           OPTIM + "test_the_loss_of_a_step_is_the_mean_over_the_targets_that_are_there"),
    Mutant("train: missing targets count as token 0", "train/loop.py",
           "targets.flatten(), ignore_index=IGNORE", "targets.flatten().clamp(min=0)",
           "train/test_parallel.py::test_targets_that_are_missing_are_not_predicted"),
    Mutant("train: gradients are not put back to zero", "train/loop.py",
           "        self.optimizer.zero_grad()\n", "", RESUMED),
    Mutant("train: the learning rate of the schedule is not used", "train/loop.py",
           'group["lr"] = rate', 'group["lr"] = self.plan.learning_rate',
           LOOP + "test_a_learning_rate_of_zero_changes_nothing"),
    Mutant("train: only the first group gets the learning rate", "train/loop.py",
           "for group in self.optimizer.param_groups:", "for group in self.optimizer.param_groups[:1]:",
           LOOP + "test_a_learning_rate_of_zero_changes_nothing"),
    Mutant("train: gradients are never clipped", "train/loop.py",
           "self.plan.clip or math.inf", "math.inf",
           OPTIM + "test_a_gradient_is_clipped_to_its_norm_and_0_clips_nothing"),
    Mutant("train: clip=0 makes every gradient 0", "train/loop.py",
           "self.plan.clip or math.inf", "self.plan.clip",
           OPTIM + "test_a_gradient_is_clipped_to_its_norm_and_0_clips_nothing"),
    Mutant("train: the seed does not decide the rows", "train/loop.py",
           "plan.batch_size * plan.accumulation, plan.seed)", "plan.batch_size * plan.accumulation)",
           OPTIM + "test_the_seed_decides_the_first_weights_and_the_rows"),
    Mutant("train: the seed does not decide the first weights", "train/loop.py",
           "Llama(self.plan.model, seed=self.plan.seed)", "Llama(self.plan.model, seed=1)",
           OPTIM + "test_the_seed_decides_the_first_weights_and_the_rows"),
    Mutant("train: the same rows at every step", "train/loop.py",
           "self.batches.batch(self.step)", "self.batches.batch(0)",
           OPTIM + "test_each_step_sees_the_rows_of_its_number"),
    Mutant("train: a loss that is not finite is trained on", "train/loop.py",
           "if math.isfinite(loss) and bool(norm.isfinite()):", "if True:",
           LOOP + "test_three_steps_that_are_not_finite_end_the_run_and_name_where_it_began"),
    Mutant("train: only the loss is looked at", "train/loop.py",
           "if math.isfinite(loss) and bool(norm.isfinite()):", "if math.isfinite(loss):",
           LOOP + "test_a_step_that_is_not_finite_is_skipped_counted_told_and_kept"),
    Mutant("train: skipped steps in a row are never forgiven", "train/loop.py",
           "            self.skipped_in_a_row = 0\n", "",
           LOOP + "test_a_run_with_skipped_steps_in_it_resumes_to_the_same_bits"),
    Mutant("train: gradients are blamed from the input forwards", "train/loop.py",
           "in reversed(list(self.model.named_parameters())):", "in self.model.named_parameters():",
           LOOP + "test_of_gradients_the_one_nearest_the_output_is_named"),
    Mutant("train: the mask of attention is taken for a fault", "train/loop.py",
           'if not name.endswith("masked_scores") and not value', "if not value",
           LOOP + "test_of_gradients_the_one_nearest_the_output_is_named"),
    Mutant("train: saved right after a skipped step", "train/loop.py",
           "if self.skipped_in_a_row and self.progress < 1:", "if False:",
           LOOP + "test_what_is_due_at_a_skipped_step_waits_for_a_good_one"),
    Mutant("train: weights that are not finite are saved", "train/loop.py",
           "            if not tensor.isfinite().all():\n", "            if False:\n",
           LOOP + "test_what_is_not_finite_is_never_saved_though_no_loss_shows_it"),
    Mutant("train: memory that is not finite is saved", "train/loop.py",
           "[*self.model.state_dict().items(), *memory.items()]", "self.model.state_dict().items()",
           LOOP + "test_what_is_not_finite_is_never_saved_though_no_loss_shows_it"),
    Mutant("train: the time of day is taken for a clock", "train/loop.py",
           "            now = time.perf_counter()\n", "            now = time.time()\n",
           LOOP + "test_a_clock_that_jumps_changes_nothing"),
    Mutant("train: evaluated on the text that is learned", "train/loop.py",
           "ids = np.asarray(self.corpus.val_ids)", "ids = np.asarray(self.corpus.train_ids)",
           LOOP + "test_the_reported_bits_per_byte_are_those_of_the_saved_model"),
    Mutant("train: best by the most bits", "train/loop.py",
           "scored.bits_per_byte < self.best_bits,", "scored.bits_per_byte > self.best_bits,",
           "test_cli.py::test_train_shows_the_plan_the_scores_and_what_to_do_next"),

    # ---- resuming --------------------------------------------------------------------------------
    Mutant("resume: the memory of the optimiser is forgotten", "train/loop.py",
           "                load_optimizer(self.model, self.optimizer, moments)\n", "                pass\n", RESUMED),
    Mutant("resume: the weights are new ones", "train/loop.py",
           "        self.model.load_state_dict(weights, strict=True)\n",
           "        self.model = Llama(config, seed=self.plan.seed)\n", RESUMED),
    Mutant("resume: the step is forgotten", "train/loop.py",
           'self.step, self.seconds = int(state["step"]), float(state["seconds"])',
           'self.step, self.seconds = 0 * int(state["step"]), float(state["seconds"])', RESUMED),
    Mutant("resume: the seconds used are not saved", "train/loop.py",
           '            "seconds": self.seconds,\n            "done"', '            "done"',
           LOOP + "test_a_run_ends_with_its_time_and_its_schedule_with_it"),
    Mutant("resume: the seconds used are forgotten", "train/loop.py",
           'float(state["seconds"])\n', '0 * float(state["seconds"])\n',
           OPTIM + "test_a_resumed_run_remembers_its_seconds_and_its_best_score"),
    Mutant("resume: skipped steps are forgotten", "train/loop.py",
           'self.skipped = int(state.get("skipped", 0))', "self.skipped = 0",
           LOOP + "test_a_run_with_skipped_steps_in_it_resumes_to_the_same_bits"),
    Mutant("resume: that skipped steps were in a row is forgotten", "train/loop.py",
           'self.skipped_in_a_row = int(state.get("skipped_in_a_row", 0))', "self.skipped_in_a_row = 0",
           LOOP + "test_a_resumed_run_remembers_how_many_steps_in_a_row_were_skipped"),
    Mutant("resume: the best score is forgotten", "train/loop.py",
           'state["best_bits_per_byte"] if state["best_bits_per_byte"] is not None else math.inf',
           'math.inf if state["best_bits_per_byte"] else math.inf',
           OPTIM + "test_a_resumed_run_remembers_its_seconds_and_its_best_score"),
    Mutant("resume: metrics of steps taken again stay", "train/loop.py",
           'kept = [line for line in self.run.metrics() if line.get("step", 0) <= step]',
           "kept = self.run.metrics()",
           OPTIM + "test_metrics_tell_of_each_step_once_though_it_was_taken_twice"),
    Mutant("resume: --step is ignored", "train/loop.py",
           "            self.run.checked(wanted)\n", "            wanted = self.run.newest_intact()[0]\n",
           API + "test_a_run_that_was_moved_goes_on_with_the_text_inside_it"),
    Mutant("resume: a damaged step asked for is taken", "train/loop.py",
           "            self.run.checked(wanted)\n", "            pass\n",
           OPTIM + "test_a_step_asked_for_whose_memory_is_damaged_by_one_bit_is_refused"),
    Mutant("resume: the newest step is taken unread", "train/loop.py",
           "wanted, passed_over = self.run.newest_intact()", "wanted = self.run.steps()[-1]",
           LOOP + "test_a_damaged_newest_step_is_passed_over_and_the_bits_are_the_same"),
    Mutant("resume: changed data is trained on", "api.py",
           'if corpus.fingerprint != run.settings["fingerprint"]:', "if False:",
           OPTIM + "test_a_run_does_not_go_on_with_another_text_prepared_in_the_same_place"),
    Mutant("resume: a signal ends the run unsaved", "train/loop.py",
           "if self.step > 0 and self.step != saved:", "if False:",
           LOOP + "test_a_signal_stops_and_saves_and_the_run_goes_on"),
    Mutant("resume: nothing is saved as something", "train/loop.py",
           "if self.step > 0 and self.step != saved:", "if self.step != saved or self.step == 0:",
           LOOP + "test_a_signal_before_the_first_step_leaves_a_run_that_can_be_resumed"),
    Mutant("run: the later steps of a course given up stay", "checkpoint/run.py",
           "if each > step]", "if False]",
           "checkpoint/test_run.py::test_a_save_gives_up_the_later_steps_of_another_course"),
    Mutant("run: run.json does not vouch for itself", "checkpoint/run.py",
           "self.settings = read_sealed(", "self.settings = read_json(",
           "checkpoint/test_run.py::test_every_flipped_bit_of_run_json_is_noticed"),
    Mutant("resume: a run in use is trained by two", "checkpoint/run.py",
           "        lock.acquire()\n", "        pass\n",
           "checkpoint/test_run.py::test_the_lock_is_one_persons_at_a_time_and_ends_with_its_process"),

    # ---- the optimiser and the plan --------------------------------------------------------------
    Mutant("optimiser: gains decay", "train/optim.py",
           'plan.weight_decay if group["role"] == "matrix" else', 'plan.weight_decay if group["role"] != "head" else',
           OPTIM + "test_decay_shrinks_matrices_and_touches_no_gain_and_no_row_of_the_vocabulary"),
    Mutant("optimiser: the vocabulary decays", "train/optim.py",
           'plan.weight_decay if group["role"] == "matrix" else', 'plan.weight_decay if group["role"] != "gain" else',
           OPTIM + "test_each_parameter_is_in_one_group_and_only_matrices_decay"),
    Mutant("optimiser: the head is taken for a matrix", "train/optim.py",
           ', "lm_head.weight": "head"}', "}", OPTIM + "test_each_parameter_has_one_role"),
    Mutant("optimiser: gains are not trained", "train/optim.py",
           '"lr": rates(plan)[kind]} for kind in members', '"lr": rates(plan)[kind]} for kind in [*members][:-1]',
           OPTIM + "test_each_parameter_is_in_one_group_and_only_matrices_decay"),
    Mutant("optimiser: betas are torch's own", "train/optim.py", "betas=(plan.beta1, plan.beta2), ", "",
           OPTIM + "test_the_plan_decides_how_long_the_optimiser_remembers"),
    Mutant("optimiser: every role has the rate of the matrices", "train/optim.py",
           'rates(self.plan)[group["role"]] * factor', "rate",
           OPTIM + "test_each_role_moves_by_its_own_rate_and_the_schedule"),
    Mutant("optimiser: the decay never falls by itself", "train/optim.py",
           "factor if self.plan.weight_decay_falls else 1.0", "1.0",
           OPTIM + "test_what_decay_takes_off_is_decay_times_rate_and_may_fall_twice"),
    Mutant("optimiser: cautious where signs differ", "train/optim.py",
           "weight * update >= 0", "weight * update <= 0",
           OPTIM + "test_decay_is_cautious_where_update_and_weight_agree_by_hand"),
    Mutant("optimiser: the cautious decay looks at the weight after the step", "train/optim.py",
           "name: weight.clone() for name", "name: weight for name",
           OPTIM + "test_adamw_is_the_written_out_one"),
    Mutant("optimiser: the step counts for nothing", "train/optim.py",
           'MOMENTS = ("step", "exp_avg", "exp_avg_sq")', 'MOMENTS = ("exp_avg", "exp_avg", "exp_avg_sq")',
           OPTIM + "test_the_memory_of_every_parameter_is_written_by_its_name"),
    Mutant("optimiser: a missing moment is passed over", "train/optim.py",
           'tensor = tensors[f"{name}.{key}"]', 'tensor = tensors.get(f"{name}.{key}", torch.zeros(()))',
           OPTIM + "test_a_missing_part_of_the_memory_is_a_key_error"),
    Mutant("optimiser: two runs share what was given back", "train/optim.py", "copy=True", "copy=False",
           OPTIM + "test_what_was_given_back_is_a_copy"),
    Mutant("Muon: without Nesterov's look ahead", "train/optim.py",
           "gradients.lerp_(momentum, beta)", "momentum.clone()",
           OPTIM + "test_the_newest_gradient_counts_by_nesterov"),
    Mutant("Muon: wide matrices are scaled too", "train/optim.py",
           "max(1.0, updates.shape[1] / updates.shape[2])",
           "max(updates.shape[2] / updates.shape[1], updates.shape[1] / updates.shape[2])",
           OPTIM + "test_muon_is_nesterov_momentum_then_the_nearest_orthogonal_matrix"),
    Mutant("Muon: a gradient of zeros is divided by zero", "train/optim.py", ".clamp(min=1e-12)", "",
           OPTIM + "test_a_gradient_of_zeros_moves_nothing"),
    Mutant("Muon: small gradients do not count", "train/optim.py", ".clamp(min=1e-12)", ".clamp(min=1e-3)",
           OPTIM + "test_no_gradient_is_too_small_or_too_large_and_zero_stays_zero"),
    Mutant("Muon: one norm for all matrices of a batch", "train/optim.py",
           "norms = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)", "norms = torch.linalg.vector_norm(x)",
           OPTIM + "test_a_batch_is_orthogonalised_as_its_matrices_one_by_one"),
    Mutant("Muon: four of five polynomials", "train/optim.py",
           "for a, b, c in POLAR_EXPRESS:", "for a, b, c in POLAR_EXPRESS[:4]:",
           OPTIM + "test_singular_values_go_through_the_five_polynomials"),
    Mutant("Muon: bfloat16 whatever the plan says", "train/optim.py",
           'torch.bfloat16 if plan.precision == "bfloat16" else torch.float32', "torch.bfloat16",
           OPTIM + "test_muon_multiplies_in_the_precision_of_the_plan"),
    Mutant("NorMuon: rows without an update are divided by zero", "train/optim.py",
           "second.sqrt().clamp(min=1e-10)", "second.sqrt()",
           OPTIM + "test_rows_without_an_update_stay_where_they_are"),
    Mutant("NorMuon: the norm is not brought back", "train/optim.py",
           "return even * (before / after.clamp(min=1e-10))", "return even",
           OPTIM + "test_rows_become_even_over_time_and_the_whole_keeps_its_norm"),
    Mutant("NorMuon: the mean squares are not written", "train/optim.py",
           "if self.plan.normuon:\n                    yield", "if False:\n                    yield",
           OPTIM + "test_the_memory_of_every_parameter_is_written_by_its_name"),
    Mutant("average: the untrained model counts", "train/optim.py",
           "(1 - older) / (1 - all_counts)", "1 - older",
           OPTIM + "test_an_average_begins_with_the_first_weights_and_forgets_the_untrained_ones"),
    Mutant("average: time is forgotten when it is read", "train/optim.py",
           'self.progress = float(tensors["average.progress"])', 'tensors["average.progress"]',
           OPTIM + "test_an_average_given_back_goes_on_with_the_same_bits"),
    Mutant("average: it is the model's own weights", "train/optim.py",
           "name: weight.detach().clone() for", "name: weight.detach() for",
           OPTIM + "test_weights_that_are_averaged_are_not_those_of_the_model"),
    Mutant("learning rate: does not reach 0", "train/optim.py",
           "plan.final + (1 - plan.final) * fall", "0.1 + 0.9 * fall",
           OPTIM + "test_the_learning_rate_rises_to_its_peak_and_falls_to_zero"),
    Mutant("learning rate: negative after the end", "train/optim.py",
           "max(0.0, min(1.0, (1 - progress) / share))", "min(1.0, (1 - progress) / share)",
           OPTIM + "test_a_run_that_goes_over_its_time_never_learns_backwards"),
    Mutant("learning rate: the first step learns nothing", "train/optim.py",
           "(progress + 1e-3) / plan.warmup", "progress / plan.warmup",
           OPTIM + "test_the_first_step_of_a_run_already_learns_and_without_warm_up_at_full_rate"),
    Mutant("learning rate: no warm-up", "train/optim.py",
           "rise = (progress + 1e-3) / plan.warmup if plan.warmup else 1.0", "rise = 1.0",
           OPTIM + "test_the_learning_rate_rises_to_its_peak_and_falls_to_zero"),
    Mutant("learning rate: wsd goes down from the start", "train/optim.py",
           'plan.decay if plan.schedule == "wsd" else 1 - plan.warmup', "1 - plan.warmup",
           OPTIM + "test_a_schedule_goes_through_points_worked_out_by_hand"),
    Mutant("plan: Muon with a rate for matrices only", "train/recipe.py",
           'if self.optimizer == "muon" and (missing', "if False and (missing",
           RECIPE + "test_muon_needs_a_rate_for_each_role_that_is_not_its_own"),
    Mutant("plan: --set cautious=false is true", "train/recipe.py",
           '{"true": True, "false": False} if kind is bool', '{"true": True, "false": True} if kind is bool',
           RECIPE + "test_a_word_that_is_none_of_a_settings_words_is_told_all_of_them"),
    Mutant("plan: a model too large for its text", "train/recipe.py",
           "if costs.parameters(one).total <= PARAMETERS_PER_BYTE * text_bytes\n            and tokens", "if tokens",
           RECIPE + "test_no_model_is_larger_than_its_text_or_its_time_allows"),
    Mutant("plan: a model too large for its time", "train/recipe.py",
           "and tokens(one) >= TOKENS_PER_PARAMETER * costs.parameters(one).total", "",
           RECIPE + "test_no_model_is_larger_than_its_text_or_its_time_allows"),
    Mutant("plan: the smallest model that fits", "train/recipe.py", "fitting[-1] if fitting", "fitting[0] if fitting",
           RECIPE + "test_more_text_and_more_time_give_a_larger_model_or_the_same"),
    Mutant("plan: the nearest size by difference", "train/recipe.py",
           "abs(math.log(costs.parameters(one).total / wished))", "abs(costs.parameters(one).total - wished)",
           RECIPE + "test_between_two_shapes_the_nearer_ratio_decides"),
    Mutant("plan: more steps a second are promised than bfloat16 allows", "train/recipe.py",
           'peak = max(speed.bfloat16, speed.float32) if precision == "bfloat16" else speed.float32',
           "peak = max(speed.bfloat16, speed.float32)",
           RECIPE + "test_a_faster_machine_trains_a_larger_model"),
    Mutant("plan: the caller's settings are used up", "train/recipe.py",
           "settings = check(minutes, steps, size, device, settings or {})",
           "check(minutes, steps, size, device, settings or {})\n    settings = settings or {}",
           RECIPE + "test_the_settings_of_the_caller_are_left_as_they_were"),
    Mutant("plan: memory is not looked at", "train/recipe.py", "    _check_memory(chosen)\n", "",
           RECIPE + "test_more_than_fits_in_memory_is_refused_and_what_fits_is_not"),
    Mutant("plan: RoPE's scaling is read as a table", "train/recipe.py",
           'model["rope_scaling"] = RopeScaling(**model["rope_scaling"])', "pass",
           RECIPE + "test_a_plan_written_down_and_read_is_the_same"),

    # ---- the score -------------------------------------------------------------------------------
    Mutant("score: a token predicts itself", "train/evaluate.py",
           "ids[begin + 1 : end + 1]", "ids[begin:end]", SCORED),
    Mutant("score: what was to be looked at is scored again", "train/evaluate.py",
           "counted[row, new - begin : end - begin]", "counted[row, : end - begin]",
           EVALUATE + "test_every_token_but_the_first_is_scored_exactly_once"),
    Mutant("score: windows do not overlap", "train/evaluate.py",
           "stride = max(1, context // 2)", "stride = context", SCORED),
    Mutant("score: bits for each token, not each byte", "train/evaluate.py",
           "ratio = nats_by_part.sum() / total", "ratio = nats_by_part.sum() / tokens",
           EVALUATE + "test_the_tokenizer_does_not_change_the_bits_of_what_is_predicted_alike"),
    Mutant("score: nats are called bits", "train/evaluate.py",
           "bits_per_byte=float(ratio / math.log(2))", "bits_per_byte=float(ratio)",
           EVALUATE + "test_a_blind_guess_among_256_bytes_is_eight_bits"),
    Mutant("score: bytes of the inputs, not of the targets", "train/evaluate.py",
           "first_lengths[targets], lengths[targets])", "first_lengths[inputs], lengths[inputs])", SCORED),
    Mutant("score: a limit takes the beginning of the text", "train/evaluate.py",
           "starts[:: math.ceil(len(starts) / max(1, max_tokens // stride))]", "starts[: max(1, max_tokens // stride)]",
           EVALUATE + "test_a_limit_takes_evenly_from_the_whole_text_and_always_the_same"),
    Mutant("score: the error bar of a sum", "train/evaluate.py",
           "nats_by_part - ratio * bytes_by_part", "nats_by_part - nats_by_part.mean()",
           EVALUATE + "test_the_error_is_that_of_drawing_parts_again"),
    Mutant("score: the error bar does not shrink with the text", "train/evaluate.py",
           "* parts / (parts - 1)) / total", "* parts) / total",
           EVALUATE + "test_the_error_of_parts_of_one_byte_is_the_standard_error_of_their_mean"),

    # ---- folders and runs ------------------------------------------------------------------------
    Mutant("folder: sizes are not compared", "checkpoint/folder.py",
           'if size != said.get("bytes"):', "if False:", FOLDER + "test_a_file_cut_short_is_noticed"),
    Mutant("folder: sums are not compared", "checkpoint/folder.py",
           'if file_sha256(path) != said.get("sha256"):', "if False:", FOLDER + "test_every_flipped_bit_is_noticed"),
    Mutant("folder: the manifest is not checked itself", "checkpoint/folder.py",
           "if path.read_bytes() != sealed(value):", "if False:",
           FOLDER + "test_every_flipped_bit_is_noticed"),
    Mutant("folder: a missing file is passed over", "checkpoint/folder.py",
           "if not path.is_file():\n            raise",
           "if not path.is_file():\n            continue\n            raise",
           FOLDER + "test_a_missing_file_is_noticed"),
    Mutant("folder: renamed before the manifest is written", "checkpoint/folder.py",
           "        _write_durably(half_done / MANIFEST,",
           "        half_done.rename(folder)\n        half_done = folder\n        _write_durably(half_done / MANIFEST,",
           NAMED),
    Mutant("folder: its files are not waited for", "checkpoint/folder.py",
           "            sync(half_done / name)\n", "            pass\n", NAMED),
    Mutant("folder: its names are not waited for", "checkpoint/folder.py",
           "        sync(half_done)\n        half_done.rename(folder)\n        sync(folder.parent)\n",
           "        half_done.rename(folder)\n", NAMED),
    Mutant("folder: its own name is not waited for", "checkpoint/folder.py",
           "        half_done.rename(folder)\n        sync(folder.parent)\n",
           "        half_done.rename(folder)\n", NAMED),
    Mutant("folder: a single file is not waited for", "checkpoint/folder.py",
           "        os.fsync(file.fileno())\n", "", API + "test_a_run_begins_with_a_file_that_is_on_the_disk"),
    Mutant("folder: a failed write leaves its half", "checkpoint/folder.py",
           "        shutil.rmtree(half_done, ignore_errors=True)  # gone already", "        pass  # gone already",
           FOLDER + "test_a_full_disk_leaves_nothing_behind_and_the_rest_untouched"),
    Mutant("folder: a file is written over in place", "checkpoint/folder.py",
           "        _write_durably(half_done, content)\n        half_done.replace(path)\n",
           "        path.write_bytes(content)\n        sync(path)\n",
           FOLDER + "test_a_replaced_file_is_the_old_one_or_the_new_one"),
    Mutant("run: old steps go before the new one was read back", "checkpoint/run.py",
           "        verify_folder(folder)\n        for later", "        for later",
           "checkpoint/test_run.py::test_a_bad_new_step_never_pushes_the_last_good_one_out"),
    Mutant("run: the rows of every skipped step are kept", "checkpoint/run.py",
           "KEEP_SKIPPED = 4", "KEEP_SKIPPED = 99",
           LOOP + "test_of_skipped_steps_the_newest_four_are_kept"),
    Mutant("run: one step is kept", "checkpoint/run.py", "KEEP_AT_LEAST = 2", "KEEP_AT_LEAST = 1",
           "checkpoint/test_run.py::test_the_newest_two_and_the_best_are_kept"),
    Mutant("run: the best step is removed", "checkpoint/run.py", "if old != best:", "if True:",
           "checkpoint/test_run.py::test_the_newest_two_and_the_best_are_kept"),
    Mutant("run: the best step is the worst", "checkpoint/run.py",
           "return -min(scores)[1]", "return -max(scores)[1]",
           API + "test_of_a_run_the_best_step_is_opened_or_the_one_asked_for"),
    Mutant("run: a step without a score is the best", "checkpoint/run.py",
           'else float("inf"), -step', "else 0.0, -step",
           "checkpoint/test_run.py::test_the_newest_two_and_the_best_are_kept"),

    # ---- Hugging Face and llama2.c ---------------------------------------------------------------
    Mutant("hf: whether the head is tied is not written", "checkpoint/hf.py",
           '    "tie_embeddings": "tie_word_embeddings",\n', "", HF),
    Mutant("hf: rope_parameters are not written", "checkpoint/hf.py",
           '        "rope_parameters": {**rope, "rope_theta": config.rope_theta},\n', "",
           "checkpoint/test_hf.py::test_old_and_new_rope_keys_mean_the_same"),
    Mutant("hf: norm_eps may be missing", "checkpoint/hf.py", '"hidden_dim", "norm_eps")', '"hidden_dim")',
           "checkpoint/test_hf.py::test_a_config_that_is_no_llamas_is_refused_naming_the_key"),
    Mutant("hf: norm_eps is not read", "checkpoint/hf.py",
           "wanted = bool if", 'if ours == "norm_eps":\n            continue\n        wanted = bool if',
           "checkpoint/test_hf.py::test_saving_and_loading_changes_nothing"),
    Mutant("hf: rope_theta is not read", "checkpoint/hf.py", "if theta is not None:", "if False:",
           "checkpoint/test_hf.py::test_what_transformers_saves_we_open"),
    Mutant("hf: the scaling is not read", "checkpoint/hf.py",
           'values["rope_scaling"] = RopeScaling(kind=kind, **scaling)', "pass",
           "checkpoint/test_hf.py::test_what_transformers_saves_we_open"),
    Mutant("hf: q and k swapped", "checkpoint/hf.py",
           '"layers.N.attention.wq.weight": "model.layers.N.self_attn.q_proj.weight",\n'
           '    "layers.N.attention.wk.weight": "model.layers.N.self_attn.k_proj.weight",',
           '"layers.N.attention.wq.weight": "model.layers.N.self_attn.k_proj.weight",\n'
           '    "layers.N.attention.wk.weight": "model.layers.N.self_attn.q_proj.weight",', HF),
    Mutant("hf: gate and up swapped", "checkpoint/hf.py",
           '"model.layers.N.mlp.gate_proj.weight",\n'
           '    "layers.N.feed_forward.w_up.weight": "model.layers.N.mlp.up_proj.weight"',
           '"model.layers.N.mlp.up_proj.weight",\n'
           '    "layers.N.feed_forward.w_up.weight": "model.layers.N.mlp.gate_proj.weight"',
           HF),
    Mutant("hf: the two norms of a block swapped", "checkpoint/hf.py",
           '"model.layers.N.input_layernorm.weight",', '"model.layers.N.post_attention_layernorm.weight",',
           "checkpoint/test_hf.py::test_every_tensor_has_one_name_on_each_side"),
    Mutant("hf: tensors that are no Llama's are passed over", "checkpoint/hf.py",
           "for name in sorted(found.keys() - wanted.keys())]", "for name in ()]",
           "checkpoint/test_hf.py::test_missing_unexpected_and_misshapen_tensors_are_all_named"),
    Mutant("llama2.c: k is ordered as if it had n_heads", "checkpoint/llama2c.py",
           "pairs_to_halves(weight, config.n_kv_heads)", "pairs_to_halves(weight, config.n_heads)",
           "checkpoint/test_llama2c.py::test_a_model_that_was_read_computes_what_run_c_does"),
    Mutant("llama2.c: q stays in pairs", "checkpoint/llama2c.py",
           "weight = pairs_to_halves(weight, config.n_heads)", "pass",
           "checkpoint/test_llama2c.py::test_a_model_that_was_read_computes_what_run_c_does"),
    Mutant("llama2.c: w2 and w3 swapped", "checkpoint/llama2c.py",
           '        ("layers.{}.feed_forward.w_down.weight", L, (D, F)),  # w2\n'
           '        ("layers.{}.feed_forward.w_up.weight", L, (F, D)),  # w3\n',
           '        ("layers.{}.feed_forward.w_up.weight", L, (F, D)),  # w3\n'
           '        ("layers.{}.feed_forward.w_down.weight", L, (D, F)),  # w2\n',
           "checkpoint/test_llama2c.py::test_a_model_that_was_read_computes_what_run_c_does"),
    Mutant("llama2.c: the tables of RoPE are not skipped", "checkpoint/llama2c.py",
           "(SKIPPED, 2, (config.max_seq_len", "(SKIPPED, 0, (config.max_seq_len",
           "checkpoint/test_llama2c.py::test_a_model_that_was_read_computes_what_run_c_does"),
    Mutant("llama2.c: a negative vocabulary is taken for a tied head", "checkpoint/llama2c.py",
           'tied = sizes["vocab_size"] > 0', "tied = True",
           "checkpoint/test_llama2c.py::test_the_sizes_come_from_the_header"),
    Mutant("layout: the heads are mixed", "checkpoint/layout.py",
           "by_pair = weight.reshape(n_heads, rows // n_heads // 2, 2, *weight.shape[1:])",
           "by_pair = weight.reshape(1, rows // 2, 2, *weight.shape[1:])",
           "checkpoint/test_layout.py::test_the_rows_move_as_drawn"),
    Mutant("layout: the way back is the way there", "checkpoint/layout.py",
           "by_half = weight.reshape(n_heads, 2, rows // n_heads // 2, *weight.shape[1:])",
           "by_half = weight.reshape(n_heads, rows // n_heads // 2, 2, *weight.shape[1:])",
           "checkpoint/test_layout.py::test_there_and_back_is_exact"),

    # ---- the surface in Python -------------------------------------------------------------------
    Mutant("api: no BOS before a prompt", "api.py",
           "self.tokenizer.encode(text, bos=True)", "self.tokenizer.encode(text)",
           API + "test_a_prompt_begins_with_one_bos_and_typed_control_tokens_are_text"),
    Mutant("api: two BOS before a prompt", "api.py",
           "[self.encode(prompt)],", "[[self.tokenizer.bos_id, *self.encode(prompt)]],",
           API + "test_a_prompt_begins_with_one_bos_and_typed_control_tokens_are_text"),
    Mutant("api: stop strings are not passed on", "api.py",
           "TextStream(self.tokenizer, stop)", "TextStream(self.tokenizer)",
           API + "test_nothing_of_a_stop_string_is_ever_shown"),
    Mutant("api: what was held back is lost", "api.py",
           "        if piece := stream.flush():\n            yield piece\n", "",
           API + "test_nothing_of_a_stop_string_is_ever_shown"),
    Mutant("api: after a stop string the work goes on", "api.py",
           "            if stream.stopped:\n                break\n", "", API + "test_a_stop_string_ends_the_work_too"),
    Mutant("api: each token is decoded by itself", "api.py",
           "if piece := stream.push(token.id):", "if piece := self.tokenizer.decode([token.id]):",
           API + "test_no_piece_of_a_text_holds_half_a_character"),
    Mutant("api: the seed is not passed on", "api.py",
           "            seed=seed,\n        )\n        tokens", "        )\n        tokens",
           API + "test_a_seed_gives_its_text_every_time_and_another_seed_another"),
    Mutant("api: min_p is not passed on", "api.py", "            min_p=min_p,\n", "",
           API + "test_every_option_reaches_the_sampler"),
    Mutant("api: an end token does not end", "api.py", "stop_ids=self.tokenizer.eos_ids,", "stop_ids=frozenset(),",
           API + "test_every_option_reaches_the_sampler"),
    Mutant("api: the newest step instead of the best", "api.py",
           "run.checked(run.best() if step", "run.checked(run.steps()[-1] if step",
           API + "test_of_a_run_the_best_step_is_opened_or_the_one_asked_for"),
    Mutant("api: a tokenizer with more ids than the model is let through", "api.py",
           "if tokenizer.vocab_size > config.vocab_size:", "if False:",
           API + "test_a_tokenizer_given_by_name_is_used_and_one_that_is_too_large_is_refused"),
    Mutant("api: negative ids count from the end", "api.py",
           "if not 0 <= min(ids) <= max(ids) < self.config.vocab_size:", "if not max(ids) < self.config.vocab_size:",
           API + "test_logits_of_ids_that_the_model_does_not_have_or_of_too_many_are_refused"),
    Mutant("api: bits per byte without the BOS", "api.py",
           "np.asarray(self.encode(text))", "np.asarray(self.tokenizer.encode(text))",
           API + "test_bits_per_byte_of_a_text_are_its_score"),
    Mutant("api: the dummy space of SentencePiece counts as a byte of the text", "api.py",
           "self.config.max_seq_len, after_bos=after_bos)", "self.config.max_seq_len)",
           API + "test_bits_per_byte_count_the_bytes_of_the_text_and_no_dummy_space"),
    Mutant("api: a device that computes wrongly is trained on", "api.py",
           "if not check.passed:", "if False:", API + "test_a_device_that_computes_wrongly_is_not_trained_on"),
]
# fmt: on


def mutated(mutant: Mutant, root: Path = ROOT) -> str:
    """The source of the file with the mistake in it. LookupError when the text is not there exactly once."""
    source = (root / "babyllama" / mutant.file).read_text(encoding="utf-8")
    if source.count(mutant.old) != 1:
        raise LookupError(f"text occurs {source.count(mutant.old)} times in {mutant.file}: {mutant.old!r}")
    return source.replace(mutant.old, mutant.new)


def copy_of_the_repository(folder: Path) -> Path:
    """What tests need, with the large files of the tests (if any) where conftest.py looks for them."""
    copy = folder / "repository"
    for name in ("babyllama", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    if (ROOT.parent / "shared").is_dir():
        (folder / "shared").symlink_to(ROOT.parent / "shared")
    return copy


def run(copy: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # No bytecode: two mutants of one length, written in one second, would share it.
    environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=copy, env=environment, capture_output=True, encoding="utf-8", errors="replace"
    )


def run_tests(copy: Path, tests: str) -> subprocess.CompletedProcess[str]:
    paths = [f"tests/{test}" for test in tests.split()]
    return run(copy, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", *paths)


def caught_by(mutant: Mutant, copy: Path) -> str | None:
    """The first test that fails; None when none does."""
    target = copy / "babyllama" / mutant.file
    right = target.read_text(encoding="utf-8")
    try:
        target.write_text(mutated(mutant, copy), encoding="utf-8")
        result = run_tests(copy, mutant.tests)
    finally:
        target.write_text(right, encoding="utf-8")
    failed = re.search(r"^FAILED tests/\S*?::(.+?)(?: - .*)?$", result.stdout, re.MULTILINE)
    if result.returncode == 1 and failed:
        return failed[1]
    if result.returncode == 0:
        return None
    raise RuntimeError(f"{mutant.name}: the tests could not run\n{result.stdout}\n{result.stderr}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Put known mistakes back and see that a test notices each.")
    parser.add_argument("--only", default="", metavar="NAME", help="mutants whose name contains this")
    only = parser.parse_args(arguments).only.lower()
    chosen = [mutant for mutant in MUTANTS if only in mutant.name.lower()]
    survivors = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy = copy_of_the_repository(Path(folder))
        imported = run(copy, "-c", "import babyllama; print(babyllama.__file__)").stdout.strip()
        assert Path(imported).resolve().is_relative_to(copy.resolve()), (
            f"{imported} was imported, not the copy"
        )
        healthy = run_tests(
            copy, " ".join(sorted({test for mutant in chosen for test in mutant.tests.split()}))
        )
        if healthy.returncode:
            print(f"The tests fail without any mutant:\n{healthy.stdout}{healthy.stderr}", file=sys.stderr)
            return 1
        print("| mutant | caught by | seconds |\n|---|---|---|", flush=True)
        for mutant in chosen:
            start = time.monotonic()
            try:
                outcome = caught_by(mutant, copy)
            except (LookupError, RuntimeError) as problem:
                print(problem, file=sys.stderr)
                outcome = None
            if outcome is None:
                survivors.append(mutant.name)
            test = f"`{outcome}`" if outcome else "**nothing**"
            print(f"| {mutant.name} | {test} | {time.monotonic() - start:.1f} |", flush=True)
    print(f"\n{len(chosen) - len(survivors)} of {len(chosen)} mutants caught.")
    return 1 if survivors or not chosen else 0


if __name__ == "__main__":
    sys.exit(main())
