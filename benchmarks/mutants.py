"""Would the tests see it? Lines are broken one at a time in a copy: python benchmarks/mutants.py

For whoever changes the heart: step, loop, loader, models, losses, diffusion, stages. It is no part
of CI; tests/test_mutants.py holds the list to the code. What should see the breaks is first run
unbroken, so that a test which is red anyway sees nothing. Prints a table and the survivors, and
exits with 1 if there is one, or if the list no longer fits the code.
"""

import argparse
import concurrent.futures
import os
import pathlib
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
TIMEOUT = 1200  # seconds for one break: a loop that never ends is seen


# {(file, file of tests): [(what is broken, tests that should see it, before, after), ...]}.
# `before` occurs once in the file. Of several tests, with "; " between, one must see it. A test
# with [a case] is run on that case alone. A fifth "slow": no fast test sees it.
# fmt: off
BREAKS = {
    ("dlc_jax/step.py", "tests/test_step.py"): [
        ("validated by the loss of training",
         "test_validation_has_a_loss_of_its_own_where_a_stage_gives_one",
         "stage.validation_loss or stage.loss", "stage.loss"),
        ("the same key in every step", "test_every_step_has_a_key_of_its_own_from_the_root",
         "fold_in(root, state.step)", "fold_in(root, 0)"),
        ("a gradient that is not finite is taken",
         "test_a_gradient_that_is_not_finite_skips_the_step_though_the_loss_is",
         " & jnp.isfinite(norm)", ""),
        ("shared_key ignores its purpose",
         "test_shared_keys_differ_by_purpose_and_from_every_examples", "2**32 - 1 - purpose",
         "2**32 - 1"),
        ("prepare is given the parameters for their average",
         "test_prepare_is_given_parameters_and_their_average",
         "params = cast(state.params, dtype, stage.tables)\n        ema = cast(state.ema,",
         "params = cast(state.params, dtype, stage.tables)\n        ema = cast(state.params,"),
        ("validation gives prepare the parameters for their average",
         "test_validation_is_given_what_a_step_is",
         "), cast(state.params, dtype, stage.tables)\n        ema = cast(state.ema,",
         "), cast(state.params, dtype, stage.tables)\n        ema = cast(state.params,"),
        ("extra is updated from the old parameters", "test_extra_is_made_of_the_new_parameters",
         "after_update(state.extra, params", "after_update(state.extra, state.params"),
        ("frozen networks stay wide under bfloat16",
         "test_bfloat16_reaches_everything_a_stage_computes_with",
         "        frozen = cast(frozen, dtype)\n", ""),
        ("tables are read in bfloat16",
         "test_tables_stay_wide_in_all_that_a_stage_computes_with_and_each_must_match",
         "params = cast(params, dtype, stage.tables)", "params = cast(params, dtype)"),
        ("the learning rate on file is the next step's",
         "test_metrics_are_of_the_step_they_describe", "learning_rate(state.step)",
         "learning_rate(state.step + 1)"),
    ],
    ("dlc_jax/train.py", "tests/contracts/test_train.py"): [
        ("the run's seed is ignored", "test_a_run_draws_from_its_seed_and_its_name",
         "jax.random.key(seed)", "jax.random.key(0)"),
        ("the root key is without the step's name", "test_a_run_draws_from_its_seed_and_its_name",
         "zlib.crc32(name.encode())", "zlib.crc32(b'')"),
        ("steps draw from a root key without seed and name",
         "test_a_run_draws_from_its_seed_and_its_name", "frozen, root)\n            loop",
         "frozen, jax.random.key(0))\n            loop"),
        ("parameters are drawn from the root key itself",
         "test_parameters_are_drawn_from_the_key_of_no_step",
         "(jax.random.fold_in(root, 2**31 - 1))", "(root)"),
        ("validation is on the training split",
         "test_validation_is_on_the_same_records_with_the_same_draws",
         'batches("validation", rows)', 'batches("train", rows)'),
        ("validation is the first batch's",
         "test_validation_is_the_mean_over_batches_each_with_draws_of_its_own", "np.mean(values)",
         "values[0]"),
        ("all validation batches have the same draws",
         "test_validation_is_the_mean_over_batches_each_with_draws_of_its_own",
         "2**31 - 2 - number", "2**31 - 2"),
        ("a warm start has fresh parameters", "test_warm_start_is_strict_and_names_what_is_new",
         "params=params, ema=ema)", "ema=ema)"),
        ("the average of a warm start starts afresh",
         "test_warm_start_is_strict_and_names_what_is_new",
         "jax.tree.map(lambda leaf: leaf.copy(), params)", "state.ema"),
        ("one step more of patience",
         "test_non_finite_steps_in_a_row_stop_the_run_and_name_the_last_good_step",
         "in_a_row >= patience", "in_a_row > patience"),
    ],
    ("dlc_jax/hosts/watch.py", "tests/test_hosts.py"): [
        ("processes stop at the smallest of their counts",
         "test_a_signal_in_one_process_stops_both_at_one_point", "max(gather", "min(gather"),
        ("who ends in order does not say so",
         "test_whoever_ends_says_why_and_the_other_ends_with_it",
         'self._say("end", json.dumps({"process": self._me,',
         'self._say("nothing", json.dumps({"process": self._me,'),
    ],
    ("dlc_jax/hosts/likeness.py", "tests/test_hosts.py"): [
        ("differences are not compared", "test_what_differs_between_processes_is_refused_in_all",
         "first.get(name) != mine.get(name)", "False"),
    ],
    ("dlc_jax/parallel/arrays.py", "tests/test_several.py"): [
        ("a process reads others' rows", "test_every_row_is_read_where_its_devices_are",
         "device.process_index == process", "device.process_index != process"),
    ],
    ("dlc_jax/data/loader.py", "tests/test_loader.py"): [
        ("order and draws from one seed", "test_order_and_draws_are_seeded_apart",
         "shuffle(seed=order_seed)", "shuffle(seed=draw_seed)"),
    ],
    ("dlc_jax/data/resilient.py", "tests/test_loader.py"): [
        ("a bad record is replaced by its neighbor",
         "test_replacements_of_neighbors_are_spread_over_the_source",
         "int(draw % len(self.source))", "(first + attempt) % len(self.source)"),
    ],
    ("dlc_jax/data/transforms.py", "tests/test_transforms.py"): [
        ("a crop's ratio is uniform, not its logarithm",
         "test_area_is_uniform_ratio_log_uniform_and_place_and_shift_uniform",
         "math.exp(0.5 * (log_low + (log_high - log_low) * aspect))",
         "math.sqrt(self.ratio[0] + (self.ratio[1] - self.ratio[0]) * aspect)"),
        ("a crop's side is uniform, not its area",
         "test_area_is_uniform_ratio_log_uniform_and_place_and_shift_uniform",
         "(low + (high - low) * share)", "(low**0.5 + (high**0.5 - low**0.5) * share) ** 2"),
        ("crops lie on the diagonal",
         "test_area_is_uniform_ratio_log_uniform_and_place_and_shift_uniform",
         "down * (height - h)", "across * (height - h)"),
        ("crops are shifted along the diagonal",
         "test_area_is_uniform_ratio_log_uniform_and_place_and_shift_uniform",
         "top + down * height", "top + across * height"),
    ],
    ("dlc_jax/models/vit.py", "tests/test_vit.py"): [
        ("one channel's deviation for all",
         "test_standardize_takes_the_mean_and_the_deviation_of_each_channel",
         "deviation.reshape(shape)", "deviation[0]"),
        ("the mask token replaces the position too", "test_vit_masked_patches_are_not_read",
         "patches + patch_positions.astype(patches.dtype)",
         "patches + (0 if masked is None else ~masked[..., None]) * patch_positions"),
    ],
    ("dlc_jax/models/simplicial.py", "tests/test_encoder.py"): [
        ("Gumbel noise ignores the temperature", "test_temperature_divides_logits_and_noise_alike",
         "lambda key: jax.random.gumbel(", "lambda key: temperature * jax.random.gumbel("),
    ],
    ("dlc_jax/models/dit.py", "tests/test_dit.py"): [
        ("no SiLU on the condition", "test_dit_is_its_blocks_between_patches_and_a_modulated_end",
         "c = jax.nn.silu(c)", "c = c"),
        ("final shift and scale swapped",
         "test_dit_is_its_blocks_between_patches_and_a_modulated_end",
         "shift, scale = jnp.split(self", "scale, shift = jnp.split(self"),
        ("positions are not stretched over images of another size",
         "test_dit_is_its_blocks_between_patches_and_a_modulated_end",
         "sincos_2d(side, side, self.width, extent=self.image // self.patch)",
         "sincos_2d(side, side, self.width)"),
    ],
    ("dlc_jax/models/dit.py", "tests/test_dit_options.py"): [
        ("the early head reads a later block", "test_the_early_head_reads_its_block",
         "if last in after:\n                after[last]",
         "if first in after:\n                after[first]"),
        ("the wide head is told the codes as well as the time",
         "test_the_wide_head_is_blocks_modulated_by_the_encoders_tokens[dit]",
         "self.head(patches, h, time)", "self.head(patches, h, c)"),
    ],
    ("dlc_jax/models/dit_parts.py", "tests/test_dit_options.py"): [
        ("what middle blocks made of kept patches goes to other rows",
         "test_middle_blocks_see_the_kept_patches_alone[some]", "absent.at[rows].set(tokens)",
         "absent.at[rows[::-1]].set(tokens)"),
        ("middle blocks see other patches than the kept",
         "test_middle_blocks_see_the_kept_patches_alone[some]", "lambda x, rows: x[rows]",
         "lambda x, rows: x[: len(rows)]"),
    ],
    ("dlc_jax/models/conditioning.py", "tests/test_dit_options.py"): [
        ("the null label is a class", "test_every_part_has_a_null_and_adds_to_the_vector",
         "table[self.classes :]", "table[self.classes - 1 : -1]"),
        ("dropped embeddings are read", "test_every_part_has_a_null_and_adds_to_the_vector",
         "if drop is not None:", "if False:"),
        ("a negative label is one of the last",
         "test_a_code_or_label_out_of_range_makes_its_example_nan",
         ", wrap_negative_indices=False", ""),
    ],
    ("dlc_jax/interop/dit_names.py", "tests/test_dit_interop.py"): [
        ("keys and values of diffusers swapped", "test_one_format_becomes_the_other",
         'enumerate("qkv")', 'enumerate("qvk")'),
        ("copies are not compared", "test_refused_in_one_line[a copy differs]",
         "if not np.array_equal(found.read(name), found.read(of)):", "if False:"),
        ("positions are not compared", "test_refused_in_one_line[trained positions]",
         "if tensor.shape != constant.shape or", "if False and"),
    ],
    ("dlc_jax/interop/sedd_names.py", "tests/test_sedd_interop.py"): [
        ("the parameters are read for their average",
         "test_of_a_file_of_training_the_average_is_read_by_the_order_of_its_names",
         "tensor for name, tensor in zip(names, averages)", "model[name] for name in names"),
    ],
    ("dlc_jax/models/time_embedding.py", "tests/test_dit.py"): [
        ("times are embedded as 0 to 1, not to 1000",
         "test_dit_is_its_blocks_between_patches_and_a_modulated_end", "scale: float = 1000.0",
         "scale: float = 1.0"),
    ],
    ("dlc_jax/models/masked_transformer.py", "tests/test_masked_transformer.py"): [
        ("soft codes read one table at all positions",
         "test_masked_transformer_reads_soft_codes[True]",
         "rows = table[..., : self.values, :]",
         "rows = jnp.broadcast_to(table[..., :1, : self.values, :], table[..., : self.values, :]"
         ".shape)"),
        ("no SiLU on sigma",
         "test_masked_transformer_is_its_blocks_between_a_table_and_a_modulated_end",
         "jax.nn.silu(sum(parts).astype(place.dtype))", "sum(parts).astype(place.dtype)"),
        ("sigma is embedded as a time",
         "test_masked_transformer_is_its_blocks_between_a_table_and_a_modulated_end",
         "CONDITION, scale=1.0", "CONDITION, scale=1000.0"),
        ("final shift and scale swapped",
         "test_masked_transformer_is_its_blocks_between_a_table_and_a_modulated_end",
         "(condition), 2, axis=-1))", "(condition), 2, axis=-1)[::-1])"),
        ("sigma is not read beside a class",
         "test_masked_transformer_adds_the_embeddings_of_sigma_and_class",
         "jax.nn.silu(sum(parts)", "jax.nn.silu(sum(parts[-1:])"),
        ("all layers drop the same", "test_dropout_differs_between_layers_and_is_off_without_keys",
         "fold(keys, jnp.arange(self.depth))", "fold(keys, 0 * jnp.arange(self.depth))"),
    ],
    ("dlc_jax/diffusion/noise.py", "tests/test_noise.py"): [
        ("the cosine has the weight of the linear schedule", "test_derivatives[cosine]",
         "np.pi / 2 / xp.tan(np.pi / 2 * t)", "1 / t"),
        ("sigma is the share of noise", "test_derivatives[linear]",
         "-xp.log1p(-xp.minimum(hidden, 1 - EDGE))", "xp.minimum(hidden, 1 - EDGE)"),
    ],
    ("dlc_jax/diffusion/masked.py", "tests/test_masked.py"): [
        ("the process's bound without its weight",
         "test_bound_of_the_exact_model_is_the_likelihood[linear]",
         "self.noise.weight(t) * nats(belief,", "nats(belief,"),
        ("simple is not divided by the mean share", "test_simple_weighs_all_times_alike",
         " / self.noise.mean", ""),
        ("the mass of scores is not learned", "test_the_score_entropy_is_sedds[log_linear]",
         "found += jnp.expm1(belief.log_mass) - belief.log_mass", "found += 0"),
        ("scores sum to V at the optimum", "test_a_normalized_score_is_the_bound",
         "size - jnp.log(values) if", "size if"),
        ("the mask's output is read", "test_outputs_beyond_the_values_are_not_read",
         "outputs[..., :values].astype", "outputs.astype"),
    ],
    ("dlc_jax/diffusion/uniform.py", "tests/test_uniform.py"): [
        ("a value is never replaced by itself", "test_a_value_is_replaced_by_any_value",
         "< share, random, codes)",
         "< share, (codes + 1 + random % (values - 1)) % values, codes)"),
        ("the uniform bound without its rate",
         "test_bound_of_the_exact_scores_is_the_likelihood[0.001-10.0]",
         "self.noise.rate(t) * total", "total"),
        ("the ratio of a value that was not replaced is one",
         "test_bound_of_the_exact_scores_is_the_likelihood[0.001-10.0]",
         "jnp.where(is_same, own[..., None],", "jnp.where(is_same, 0.0,"),
    ],
    ("dlc_jax/diffusion/replace.py", "tests/test_uniform.py"): [
        ("the start is one value",
         "test_draws_start_from_random_values_and_keep_what_is_known[ancestral]",
         "jax.random.randint(key, (chain.length,), 0, v, jnp.int32)",
         "jnp.zeros(chain.length, jnp.int32)"),
        ("known positions change",
         "test_draws_start_from_random_values_and_keep_what_is_known[ancestral]",
         "moves = chain.open & (", "moves = ("),
        ("scores are not taken a step back",
         "test_one_position_is_drawn_exactly_in_any_number_of_calls[3]",
         "s = jnp.exp(less) * s - jnp.expm1(less) / v * s.sum(-1, keepdims=True)", "s = 1.0 * s"),
        ("what a schedule leaves at t=0 stays",
         "test_one_position_is_drawn_exactly_in_any_number_of_calls[1]",
         "    sigma[-1] = 0", "    sigma[-1] = 0.02"),
        ("Euler's rate is that of the step's end",
         "test_a_step_changes_as_many_as_its_noise_says[euler]",
         "noise.rate(times[:-1], np)", "noise.rate(times[1:], np)"),
    ],
    ("dlc_jax/diffusion/flow.py", "tests/test_flow.py"): [
        ("the gain does not go by the schedule", "test_at_t_that_share_is_wrong[16]",
         "* values / (values - 1)\n", "\n"),
        ("what is seen is not a posterior",
         "test_what_is_seen_is_each_positions_own_posterior",
         "jnp.reshape(gain, (-1, 1, 1)) * y", "y"),
        ("the flow's bound without its weight",
         "test_bound_of_the_exact_mean_is_the_likelihood[linear]",
         "-gain * slope * error", "error"),
        ("the flow's bound weighs by the gain's rise alone",
         "test_bound_of_the_exact_mean_is_the_likelihood[linear]", "-gain * slope", "-slope"),
        ("only wrong positions are learned",
         "test_what_is_learned_is_the_cross_entropy_of_all_positions",
         "codes[..., None], -1).sum((1, 2))",
         "codes[..., None], -1).sum((1, 2)) * self.noise.hidden(t)"),
    ],
    ("dlc_jax/diffusion/transport.py", "tests/test_flow.py"): [
        ("the flow rises by the square of the gain", "test_draws_the_joint_distribution[euler]",
         "np.diff(gain)[:-1])", "np.diff(np.square(gain))[:-1])"),
        ("no noise after the first", "test_draws_the_joint_distribution[ancestral]",
         " + jnp.sqrt(more) * _normal(", " + 0 * _normal("),
        ("the same noise in every step", "test_draws_the_joint_distribution[ancestral]",
         "folded(chain.order, index)", "chain.order"),
    ],
    ("dlc_jax/diffusion/chain.py", "tests/test_code_samplers.py"): [
        ("a position's noise depends on the number of calls",
         "test_noise_of_a_position_is_the_same_in_any_number_of_calls",
         "keys = self.value if number", "keys = folded(self.value, self.calls) if number"),
        ("noise of the common range", "test_noise_has_the_high_range", ', mode="high")', ")"),
        ("the value that fills the nucleus is left out", "test_temperature_and_nucleus",
         "jnp.cumsum(falling, -1) - falling", "jnp.cumsum(falling, -1)"),
        ("the nucleus takes a value too many", "test_temperature_and_nucleus",
         "jnp.cumsum(falling, -1) - falling",
         "jnp.cumsum(falling, -1) - falling - jnp.roll(falling, 1, -1)"),
        ("logits are multiplied by the temperature", "test_temperature_and_nucleus",
         "log_p / sampler.temperature", "log_p * sampler.temperature"),
    ],
    ("dlc_jax/diffusion/reveal.py", "tests/test_code_samplers.py"): [
        ("the chance to be revealed is not that of what is hidden still",
         "test_ancestral_nears_the_joint_with_steps",
         "(levels[:-1] - levels[1:]) / levels[:-1]", "levels[:-1] - levels[1:]"),
        ("a score's mass is not read", "test_the_mass_of_a_score_hurries_or_waits[ancestral]",
         "chance[index] * jnp.exp(mass)", "chance[index]"),
        ("one order for all examples", "test_orders_differ_between_examples",
         "1 - chain.uniform(), -1.0)", "1 - chain.uniform()[:1], -1.0)"),
        ("MaskGIT keeps a line hidden", "test_maskgit_keeps_a_cosine_hidden",
         "jnp.cos(jnp.pi / 2 * (index + 1) / calls)", "1 - (index + 1) / calls"),
        ("the least sure first", "test_the_surest_come_first", "lambda log_p, *_: log_p)",
         "lambda log_p, *_: -log_p)"),
        ("MaskGIT's order stays random where calls are left",
         "test_few_calls_draw_positions_of_a_call_by_themselves", "(1 - (index + 1) / calls) *",
         "(1 - (index + 1) / chain.calls) *"),
        ("the entropy bound ignores how many calls are left",
         "test_known_positions_stay_and_no_mask_is_left[entropy]", "(free | (rank < due))",
         "(free | (rank < 1))"),
        ("calls are counted in which nothing is revealed", "test_sure_codes_need_few_calls",
         "return codes, jnp.zeros(len(codes), bool)", "return codes, jnp.ones(len(codes), bool)"),
    ],
    ("dlc_jax/diffusion/remask.py", "tests/test_code_samplers.py"): [
        ("known positions are hidden again",
         "test_known_positions_stay_and_no_mask_is_left[remdm_cap]", "chain.open & (draw < again)",
         "(draw < again)"),
        ("a score's mass is not read where positions are hidden again",
         "test_the_mass_of_a_score_hurries_or_waits[remask]",
         "jnp.minimum(reveal * jnp.exp(mass), 1)", "reveal"),
        ("what is hidden again is not made up for",
         "test_hiding_again_keeps_the_share_of_the_schedule[remdm_cap-linear]",
         "((1 - after) - (1 - again) * (1 - now)) / now", "(now - after) / now"),
        ("the paper's compensation is a step in time",
         "test_hiding_again_keeps_the_share_of_the_schedule[remask-cosine]",
         "np.maximum(after - eta * (1 - now), 0)",
         "_hidden(chain, np.maximum(times[1:] - eta * (1 - times[:-1]), 0))"),
        ("the paper hides again outside its window", "test_chances_of_hiding_again[remask]",
         "(stop < times[:-1]) & ", ""),
        ("the likeliest value loses nothing",
         "test_the_papers_remasking_is_a_joint_draw_with_eta_moved",
         "(p - eta * (p == best[..., None]))", "p"),
    ],
    ("dlc_jax/diffusion/schedules.py", "tests/test_schedules.py"): [
        ("stratified times are in the middle of their interval",
         "test_stratified_times_belong_to_the_place_not_to_the_split", "jax.random.uniform(part)",
         "0.5"),
    ],
    ("dlc_jax/diffusion/process.py", "tests/test_ddpm.py"): [
        ("lower and upper variance swapped",
         "test_a_respaced_posterior_is_that_of_the_respaced_betas", "return mean, lower\n",
         "return mean, upper\n"),
        ("the learned variance leaves from the upper one",
         "test_a_respaced_posterior_is_that_of_the_respaced_betas", "return mean, lower * ",
         "return mean, upper * "),
    ],
    ("dlc_jax/diffusion/linear.py", "tests/test_processes.py"): [
        ("the grid is not shifted",
         "test_the_shift_by_dimension_is_in_training_and_in_sampling",
         "self._shifted(schedules.grid(spacing, steps), dimension)",
         "schedules.grid(spacing, steps)"),
        ("training times are not shifted",
         "test_the_shift_by_dimension_is_in_training_and_in_sampling",
         "return self._shifted(u, dimension)", "return u"),
        ("the floor of the weight ignored", "test_the_linear_loss_against_numpy[x]",
         "jnp.maximum(t, self.floor)", "t"),
        ("data of a velocity from the other end",
         "test_a_perfect_output_gives_data_and_noise_and_costs_nothing", "x_t - t * output",
         "x_t - (1 - t) * output"),
        ("the loss of a denoiser is not float32",
         "test_a_loss_is_of_each_example_alone_in_float32", "value.astype(jnp.float32) for",
         "value for"),
    ],
    ("dlc_jax/diffusion/ddpm.py", "tests/test_ddpm.py"): [
        ("betas off by one", "test_the_path_is_that_of_linear_betas",
         "np.linspace(first, last, steps)", "np.linspace(first, last, steps + 1)[1:]"),
        ("the network is told n + 1", "test_the_path_is_that_of_linear_betas",
         "(self._row(t) - 1) / 1000", "self._row(t) / 1000"),
        ("respaced steps are rounded down",
         "test_respaced_steps_are_evenly_spread_and_rounded", "np.round(share", "np.floor(share"),
        ("the bound reaches the mean", "test_the_bound_teaches_the_variance_alone",
         "jax.lax.stop_gradient(error)", "error"),
        ("the bound in nats", "test_a_step_of_the_bound_against_numpy",
         " / math.log(2)", ""),
        ("the bound is scaled by 1 / 1000",
         "test_the_loss_is_the_noise_error_and_the_bound_in_bits",
         "mean_square(error) + self._bound", "mean_square(error) + 1e-3 * self._bound"),
        ("the first step is a divergence too", "test_the_bound_is_the_entropy_of_gaussian_data",
         "first = per_example(row == 1, x0)", "first = per_example(row == 0, x0)"),
        ("the range's place is not halved", "test_what_the_output_says", "(range_ + 1) / 2",
         "range_ + 1"),
        ("bins of half their width",
         "test_the_first_step_gives_the_256_bins_masses_that_sum_to_one", "HALF = 1 / 255",
         "HALF = 0.5 / 255"),
    ],
    ("dlc_jax/diffusion/edm.py", "tests/test_processes.py"): [
        ("EDM's weight left out", "test_edm_is_preconditioned_as_in_its_table",
         "return mean_square(output - target)",
         "return mean_square((output - target) * sigma * self.sigma_data / self._root(sigma))"),
        ("EDM's input is not scaled",
         "test_edm_inputs_and_targets_have_variance_one_at_any_noise",
         "(scale * x_t).astype", "x_t.astype"),
        ("EDM's noise is not bounded",
         "test_edm_trains_on_log_normal_noise_within_its_bounds",
         "(high - low), TINY, 1)", "(high - low), TINY, 2)"),
        ("EDM's grid ends a step above sigma_min", "test_edm_visits_its_own_noise",
         "schedules.grid(spacing, max(steps - 1, 1))", "schedules.grid(spacing, steps)"),
    ],
    ("dlc_jax/diffusion/sample.py", "tests/test_samplers.py"): [
        ("a sample starts from half the noise", "test_a_sample_depends_on_its_key_alone",
         "jax.random.normal(", "0.5 * jax.random.normal("),
        ("every step draws the same noise",
         "test_a_stochastic_method_gets_new_keys_for_every_step_and_example",
         "_fold(streams, number)", "_fold(streams, 0)"),
        ("Heun never corrects", "test_orders_of_the_integrators", "jax.lax.cond(s > 0, correct",
         "jax.lax.cond(s > 1, correct"),
        ("ddim's noise is added and not exchanged", "test_ddim_with_all_noise_is_ancestral",
         "jnp.square(sigma) - fresh", "jnp.square(sigma)"),
        ("the last step of the SDE is noisy", "test_a_network_that_knows_the_data_ends_there",
         "jnp.where(s > 0, sigma - sigma_s, 0)", "sigma - sigma_s"),
        ("the SDE adds half its noise", "test_a_mixture_is_drawn_as_it_is",
         "jnp.sqrt(2 * sigma * less)", "jnp.sqrt(sigma * less)", "slow"),
        ("churn outside its interval", "test_marginals_stay_right_under_churn",
         "(t >= low) & (t <= high)", "(t >= 0)"),
        ("churn's noise is not what the raised time has", "test_marginals_stay_right_under_churn",
         "(sigma_r - old) * (sigma_r + old)", "jnp.square(sigma_r - old)"),
    ],
    ("dlc_jax/diffusion/guidance.py", "tests/test_guidance.py"): [
        ("the interval's upper end is open",
         "test_a_batch_at_an_end_of_the_interval_is_guided", "t <= high", "t < high"),
        ("the variance of the weak prediction",
         "test_the_variance_is_the_conditional_prediction_s", "weak.noise), found.mix",
         "weak.noise), weak.mix"),
        ("the noise is not guided", "test_guided_is_the_line_through_weak_and_conditional",
         "mixed(found.noise, weak.noise)", "found.noise"),
    ],
    ("dlc_jax/losses/ssl.py", "tests/test_ssl_loss.py"): [
        ("no gradient for being another's nearest", "test_koleo_gradient_pushes_neighbors_apart",
         "x - jnp.take_along_axis(x,", "x - jnp.take_along_axis(fixed,"),
    ],
    ("dlc_jax/stages/encoder/distillation.py", "tests/contracts/test_encoder_stage.py"): [
        ("consistency temperatures swapped",
         "test_terms_are_those_of_whole_images[shared-centering]",
         "objective.consistency_temperature[1]", "objective.consistency_temperature[0]"),
        ("the student's consistency temperature is the teacher's",
         "test_terms_are_those_of_whole_images[shared-centering]",
         "objective.consistency_temperature[0]", "objective.consistency_temperature[1]"),
        ("teacher temperature fixed, with centering",
         "test_terms_are_those_of_whole_images[shared-centering]",
         "STUDENT)\n    temperature = rise(objective.teacher_temperature, step)",
         "STUDENT)\n    temperature = objective.teacher_temperature[0]"),
        ("teacher temperature fixed, with Sinkhorn",
         "test_terms_are_those_of_whole_images[shared-sinkhorn]",
         "TEACHER)\n    temperature = rise(objective.teacher_temperature, step)",
         "TEACHER)\n    temperature = objective.teacher_temperature[0]"),
        ("the teacher's simplices have the student's temperature",
         "test_terms_are_those_of_whole_images[shared-centering]",
         "rise(objective.simplex_temperature[1], step)",
         "rise(objective.simplex_temperature[0], step)"),
        ("images are taught by one crop", "test_terms_are_those_of_whole_images[shared-sinkhorn]",
         'out["logits"].mean(1)', 'out["logits"][:, 0]'),
        ("the patches' center is of all patches, masked or not",
         "test_centers_are_means_over_crops_and_over_masked_patches",
         'aux["patch_center"] / patches', 'aux["patch_center"]'),
        ("the center forgets at a fixed pace",
         "test_centers_are_means_over_crops_and_over_masked_patches",
         "momentum = setup.objective.center_momentum", "momentum = 0.9"),
    ],
    ("dlc_jax/stages/encoder/distillation.py", "tests/contracts/test_encoder_student.py"): [
        ("the average teaches, and not the frozen one",
         "test_the_teacher_is_the_frozen_one_and_the_student_learns_from_images_alone",
         '(frozen or {}).get("teacher", ema)', "ema"),
    ],
    ("dlc_jax/stages/encoder/__init__.py", "tests/contracts/test_encoder_stage.py"): [
        ("masks without the seed",
         "test_batches_are_of_the_split_and_their_crops_and_masks_of_the_seed",
         "ratio=objective.mask_ratio,\n            seed=seed",
         "ratio=objective.mask_ratio,\n            seed=0"),
        ("its data seed ignored",
         "test_batches_are_of_the_split_and_their_crops_and_masks_of_the_seed",
         "batch=section.train.batch,\n        seed=seed",
         "batch=section.train.batch,\n        seed=0"),
        ("validation on the training split",
         "test_batches_are_of_the_split_and_their_crops_and_masks_of_the_seed",
         "data.source(split,", 'data.source("train",'),
    ],
    ("dlc_jax/stages/prior/__init__.py", "tests/test_prior_stage.py"): [
        ("the loss without its weight", "test_guessing_evenly_costs_log_v_a_token",
         "process.loss(*of, values=model.values).mean()",
         "(process.loss(*of, values=model.values) / process.noise.weight(t)).mean()"),
        ("the bound beside it without its weight", "test_guessing_evenly_costs_log_v_a_token",
         "process.bound(*of, values=model.values).mean()",
         "(process.bound(*of, values=model.values) / process.noise.weight(t)).mean()"),
        ("no warm-up of the average", "test_the_average_warms_up",
         "jnp.minimum(section.ema_decay, (1 + step) / (10 + step))", "section.ema_decay"),
        ("validated with dropout", "test_the_networks_time_is_the_schedules",
         "functools.partial(loss, section, training=False)", "None"),
        ("its data seed ignored", "test_batches_are_of_the_split_in_the_order_of_the_seed",
         '"seed": config.seed', '"seed": 0'),
        ("validation on the training codes",
         "test_batches_are_of_the_split_in_the_order_of_the_seed", "source = store(split)",
         'source = store("train")'),
    ],
    ("dlc_jax/stages/prior/distill.py", "tests/test_distill.py"): [
        ("the teacher is taught", "test_the_divergence[reverse]",
         "jax.lax.stop_gradient(target)", "target"),
        ("the divergences swapped", "test_the_divergence[reverse]", '== "reverse" else',
         '== "forward" else'),
        ("what is revealed is taught by its own value",
         "test_the_last_word_before_a_position_is_revealed",
         "jnp.where(hidden[..., None], log_p, target)", "log_p"),
        ("the teacher's first word is taught", "test_the_last_word_before_a_position_is_revealed",
         "jnp.where(hidden[..., None], log_p, target)", "jnp.where(index == 0, log_p, target)"),
        ("the teacher's steps are too long", "test_a_teacher_is_told_the_times_of_its_steps",
         "(index + n) / section.teacher_calls", "(index + n) * section.calls"),
        ("not divided by the mean share", "test_the_divergence[forward]",
         "(noisy == values) / process.noise.mean", "(noisy == values)"),
    ],
    ("dlc_jax/stages/prior/distill.py", "tests/test_flow.py"): [
        ("a flow's steps weigh alike", "test_one_step_of_a_student_ends_where_its_teachers_do",
         "jnp.log(more / jnp.maximum(more.sum(0), 1e-30))", "jnp.log(more * 0 + 1 / steps)"),
    ],
    ("dlc_jax/stages/prior_scores.py", "tests/test_prior_scores.py"): [
        ("the floor of held-out codes beside themselves",
         "test_a_prior_cannot_be_told_from_its_own_draws", 'compare(codes["train"], real)',
         "compare(real, real)"),
        ("the sampler of the section ignored", "test_samplers_show_in_the_scores",
         "sampler=section.code_sampler)\n    results", "sampler=CodeSampler())\n    results"),
    ],
    ("dlc_jax/evals/two_samples.py", "tests/test_code_likeness.py"): [
        ("judged on what it learned from",
         "test_the_classifier_tells_nothing_of_two_draws_of_one_distribution",
         "for _, half in halves))", "for half, _ in halves))"),
    ],
    ("dlc_jax/stages/generator/objective.py", "tests/test_generator_stage.py"): [
        ("pixels in [0, 1]", "test_the_loss_is_of_pixels_from_minus_one_to_one",
         "images.astype(jnp.float32) / 127.5 - 1.0", "images.astype(jnp.float32) / 255.0"),
        ("foreign values one's own", "test_codes_are_dropped_whole_and_by_position",
         "(rows + 1 + columns % (size - 1)) % size", "rows + 0 * columns"),
        ("foreign values never chosen from the neighbors",
         "test_codes_are_dropped_whole_and_by_position",
         'batch["other" if objective.foreign else "codes"]', 'batch["codes"]'),
        ("foreign values all of one image", "test_codes_are_dropped_whole_and_by_position",
         "(rows + 1 + columns % (size - 1))", "(rows + 1)"),
        ("codes never dropped whole", "test_codes_are_dropped_whole_and_by_position",
         "jax.random.uniform(key) < objective.drop", "jax.random.uniform(key) < 0"),
        ("codes never dropped by position", "test_codes_are_dropped_whole_and_by_position",
         "jnp.where(some, instead, codes)", "codes"),
        ("always the largest share of positions dropped",
         "test_codes_are_dropped_whole_and_by_position",
         "jax.random.uniform(level) * objective.drop_positions", "objective.drop_positions"),
        ("none and foreign mixed in one example", "test_codes_are_dropped_whole_and_by_position",
         "jax.random.uniform(kind) < objective.foreign",
         "jax.random.uniform(kind, codes.shape) < objective.foreign"),
        ("times from a key without the seed", "test_every_draw_is_another_with_another_key",
         "shared_key(key, TIME)", "shared_key(jax.random.key(0), TIME)"),
        ("times uniform", "test_times_are_logit_normal_one_in_each_part",
         "t = process.times(u, x[0].size)", "t = u"),
        ("one noise for all examples", "test_noisy_images_lie_between_pixels_and_normal_noise",
         "draw(example_keys(key, position, NOISE))",
         "jnp.broadcast_to(jax.random.normal(key, x.shape[1:]), x.shape)"),
        ("labels never dropped", "test_labels_are_dropped_with_the_codes",
         "jnp.where(null, model.classes, batch[\"label\"])", "batch[\"label\"]"),
        ("the early head is not trained", "test_early_head_alignment_and_routing_are_in_the_loss",
         'total = total + objective.early * metrics["early"]', "total = total"),
        ("alignment never ends", "test_early_head_alignment_and_routing_are_in_the_loss",
         "step < objective.align_until if objective.align_until else True", "True"),
        ("patches are dropped to the end",
         "test_early_head_alignment_and_routing_are_in_the_loss",
         "step < objective.route_until", "step < 2**30"),
    ],
    ("dlc_jax/stages/generator/__init__.py", "tests/test_generator_stage.py"): [
        ("no warm-up of the average", "test_the_average_warms_up",
         "jnp.minimum(section.ema_decay, (1 + step) / (10 + step))", "section.ema_decay"),
        ("its data seed ignored",
         "test_batches_are_of_the_split_in_the_order_of_the_seed_with_their_codes",
         '"batch": plan.batch, "seed": config.seed', '"batch": plan.batch, "seed": 0'),
    ],
    ("dlc_jax/stages/generator/pictures.py", "tests/test_generator_stage.py"): [
        ("the grid draws the parameters and not their average",
         "test_the_grid_draws_unseen_images_by_the_average",
         "state.params if state.ema is None else state.ema", "state.params"),
        ("the grid shows images of training", "test_the_grid_draws_unseen_images_by_the_average",
         'store("validation").codes(rows)', 'store("train").codes(rows)'),
    ],
    ("dlc_jax/networks/generator.py", "tests/test_pipeline.py"): [
        ("pixels (x + 1) * 100",
         "test_pixels_are_those_the_network_knows_led_away_from_the_null_condition",
         "(images + 1) * 127.5", "(images + 1) * 100"),
        ("the network's data taken for a velocity",
         "test_pixels_are_those_the_network_knows_led_away_from_the_null_condition",
         "recipe.build(PROCESSES, self.section.process)", "PROCESSES['linear']()"),
        ("guidance inverted",
         "test_pixels_are_those_the_network_knows_led_away_from_the_null_condition",
         "guidance.guided(self._predictor(own, given), less, how)",
         "guidance.guided(less, self._predictor(own, given), how)"),
    ],
    ("dlc_jax/networks/prior.py", "tests/test_pipeline.py"): [
        ("the prior's temperature ignored", "test_the_temperature_reaches_the_prior",
         "sampler.draw(self", "CodeSampler(calls=sampler.calls).draw(self"),
        ("the likeliest positions are drawn anew",
         "test_the_least_likely_positions_are_drawn_anew", "np.inf, -bits)", "np.inf, bits)"),
        ("what is drawn again gets the noise that it has",
         "test_what_is_drawn_again_has_other_noise_than_before", "given[\"keys\"], purpose)",
         "given[\"keys\"], purpose) if False else given[\"keys\"]"),
        ("the bound in nats", "test_how_likely_codes_and_their_values_are",
         "nats.astype(np.float64) / np.log(2)", "nats.astype(np.float64)"),
    ],
    ("dlc_jax/evals/probe.py", "tests/test_probe.py"): [
        ("features standardized over unseen images too",
         "test_what_a_probe_trains_on_and_what_it_scores",
         "mean, deviation = train.mean(axis=0, dtype=np.float64).astype(np.float32), "
         "train.std(axis=0)",
         "both = np.concatenate([train, unseen])\n"
         "    mean, deviation = both.mean(axis=0), both.std(axis=0)"),
        ("the rate chosen on the larger part", "test_what_a_probe_trains_on_and_what_it_scores",
         "held, kept = np.split", "kept, held = np.split"),
        ("the rate chosen on the first images, of one class in folders",
         "test_what_a_probe_trains_on_and_what_it_scores",
         "order = np.random.default_rng(seed).permutation(len(train))",
         "order = np.arange(len(train))"),
    ],
}
# fmt: on


class Mutant(NamedTuple):
    """One break; `tests` are pytest's names."""

    file: str
    what: str
    before: str
    after: str
    tests: tuple[str, ...]
    speed: str = "fast"


MUTANTS = [
    Mutant(file, what, before, after, tuple(f"{path}::{name}" for name in names.split("; ")), *slow)
    for (file, path), breaks in BREAKS.items()
    for what, names, before, after, *slow in breaks
]


class Checkout:
    """A copy of the working tree but for what git ignores: breaks are made here alone."""

    def __init__(self, folder: pathlib.Path, cache: pathlib.Path):
        self.folder = folder
        listing = ["git", "ls-files", "-coz", "--exclude-standard"]
        listed = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True, text=True)
        for name in listed.stdout.split("\0"):
            if name and (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, folder / name)
        self.environment = os.environ | {
            "PYTHONPATH": str(folder),  # of subprocesses too
            "PYTHONDONTWRITEBYTECODE": "1",  # a .pyc hides a break of the same second and size
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }

    def pytest(self, *arguments: str, timeout: float | None = None) -> tuple[int, str]:
        """The exit code, 1 where a test fails, and what it said. All marks are run."""
        command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "", "--tb=no", *arguments]
        options = {"cwd": self.folder, "env": self.environment, "timeout": timeout}
        try:
            done = subprocess.run(command, capture_output=True, text=True, **options)
        except subprocess.TimeoutExpired:
            return 1, "FAILED it never ended"
        return done.returncode, done.stdout + done.stderr

    def green(self, names: list[str]) -> set[str]:
        """Those of the tests that pass unbroken."""
        _, said = self.pytest("-rA", *names)
        cases = re.findall(r"^(PASSED|FAILED|ERROR) (.*?)(?: - .*)?$", said, re.MULTILINE)

        def words(name):
            return {word for word, case in cases if f"{case}[".startswith(f"{name}[")}

        return {name for name in names if words(name) == {"PASSED"}}

    def sees(self, mutant: Mutant) -> tuple[str, float]:
        """The first test that sees the break, "" for none; and the seconds that it took."""
        path, start = self.folder / mutant.file, time.monotonic()
        whole = path.read_text()
        try:
            path.write_text(whole.replace(mutant.before, mutant.after))
            code, said = self.pytest("-x", *mutant.tests, timeout=TIMEOUT)
        finally:
            path.write_text(whole)
        if code not in (0, 1):
            raise RuntimeError(f"{mutant.what}: pytest ended with {code}\n{said[-1500:]}")
        found = re.search(r"^(?:FAILED|ERROR) (.*?)(?: - .*)?$", said, re.MULTILINE)
        return (found[1] if found else "a test") if code else "", time.monotonic() - start


def stale(mutants) -> list[str]:
    """The breaks that no longer fit the code."""
    found = []
    for mutant in mutants:
        count = (ROOT / mutant.file).read_text().count(mutant.before)
        if count != 1:
            found.append(f"{mutant.file}: {mutant.before!r} occurs {count} times, not once")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("words", nargs="*", help="only breaks with one of these in their description or file")
    add("--jobs", type=int, default=1, help="breaks at a time")
    add("--fast", action="store_true", help="without those that only a slow test sees")
    add("--list", action="store_true", help="lists the breaks and runs nothing")
    options = parser.parse_args()
    chosen = [
        mutant
        for mutant in MUTANTS
        if any(word in f"{mutant.file} {mutant.what}" for word in options.words or [""])
        if not (options.fast and mutant.speed == "slow")
    ]
    if options.list:
        print("\n".join(f"{mutant.file}: {mutant.what}" for mutant in chosen))
        return 0
    if bad := stale(chosen):
        print("\n".join(bad))
        return 1
    with tempfile.TemporaryDirectory() as folder:
        return run(chosen, pathlib.Path(folder), options.jobs)


def run(mutants: list[Mutant], folder: pathlib.Path, jobs: int) -> int:
    free = queue.Queue()
    for job in range(jobs):
        free.put(Checkout(folder / f"checkout{job}", folder / "compiled"))
    checkout = free.get()
    names = sorted({name for mutant in mutants for name in mutant.tests})
    green = checkout.green(names)
    free.put(checkout)
    red = [name for name in names if name not in green]

    def measure(mutant):
        checkout = free.get()
        try:
            return checkout.sees(mutant)
        finally:
            free.put(checkout)

    survivors = []
    print("| file | break | seen by | s |\n|---|---|---|---|")
    judged = [mutant for mutant in mutants if green.issuperset(mutant.tests)]
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        for mutant, (seen, seconds) in zip(judged, pool.map(measure, judged)):
            row = (mutant.file, mutant.what, seen or "NOTHING", f"{seconds:.1f}")
            print(f"| {' | '.join(row)} |", flush=True)
            survivors += [] if seen else [mutant.what]
    for name in red:
        print(f"not judged, it does not pass unbroken: {name}")
    seen = len(judged) - len(survivors)
    print(f"{seen} of {len(mutants)} seen; survivors: {'; '.join(survivors) or 'none'}")
    return int(bool(survivors or red))


if __name__ == "__main__":
    sys.exit(main())
