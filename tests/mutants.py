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
           "cls(seed=seed), 0", "cls(seed=secrets.randbits(32)), 0",
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
           "call.attend(q, k, v, call.mask, tap)", "call.attend(q, k, rotate(v, call.rope), call.mask, tap)", PARITY),
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
