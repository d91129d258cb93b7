"""Changes of the code that a careless edit could make, each of them wrong: what ``benchmarks.mutations`` tries.

They are drawn over all folders of ``vfx`` and ``passes``; most of them leave a network that runs and is a little wrong.
Behind them stands each fact of the registry of operators, taken from all operators at once.
"""

from __future__ import annotations

from dataclasses import MISSING, Field, dataclass, fields
from typing import Any

from vfx.operators import UNKNOWN, Operator


@dataclass(frozen=True)
class Mutation:
    """``old``, which stands in ``file`` once, replaced by ``new``.

    ``tests`` should notice: files, of long ones the tests.
    """

    file: str
    old: str
    new: str
    breaks: str
    tests: str

    @property
    def test_names(self) -> list[str]:
        """The tests as pytest calls them."""
        pairs = (name.partition("::") for name in self.tests.split())
        return [f"tests/{file}.py{colons}{test}" for file, colons, test in pairs]


CHANGES = (
    # analyse
    Mutation(
        "vfx/analyse/cost.py", "return Count(0, 2 * call.size, 4 * call.size)",
        "return Count(0, 2 * call.size, 2 * call.size)", "a norm's MAdd counts as its FLOPs",
        "test_cost::test_batch_norm_row",
    ),
    Mutation(
        "vfx/analyse/cost.py", '"average pool": partial(_pool, spared=0)', '"average pool": partial(_pool, spared=1)',
        "an average counts as a maximum", "test_cost::test_modules test_cost::test_totals",
    ),
    Mutation(
        "vfx/analyse/cost.py", "for p in call.parameters if _held_as(p) not in counted)", "for p in call.parameters)",
        "a shared parameter counts for each reader", "test_cost::test_shared_weights_count_once",
    ),
    Mutation(
        "vfx/analyse/symmetry.py", "lambda: _inferred(program), *program.weights)", "lambda: _inferred(program))",
        "symmetries of other weights are taken for a network's own",
        "test_symmetry::test_a_buffer_must_be_uniform_in_every_edge",
    ),
    Mutation(
        "vfx/analyse/verify.py", "for scale in (None, LARGE):", "for scale in (None,):",
        "saturations are not reached by the proof",
        "test_symmetry::test_a_bound_that_small_values_do_not_reach_is_seen",
    ),
    Mutation(
        "vfx/analyse/action/pointwise.py", "low is not None and high is not None and low == -high",
        "low is not None and high is not None", "a clamp between any two bounds passes signs",
        "test_operator_networks::test_its_class_is_proved_and_it_is_costed_and_resized[aten.clamp]",
    ),
    Mutation(
        "vfx/analyse/action/pointwise.py", "return _reduced(w, node, a, Maps.ORTHOGONAL_ONES, Maps.LINEAR)",
        "return _reduced(w, node, a, Maps.ORTHOGONAL, Maps.LINEAR)", "a sum over channels passes any rotation of them",
        "test_operator_networks::test_its_class_is_proved_and_it_is_costed_and_resized[aten.sum]",
    ),
    Mutation(
        "vfx/analyse/action/normalizing.py", "Maps.ORTHOGONAL_ONES if centred else Maps.ORTHOGONAL)",
        "Maps.ORTHOGONAL)", "LayerNorm passes the maps of an RMSNorm",
        "test_classes::test_the_class_of_each_group_is_found_and_true",
    ),
    Mutation(
        "vfx/analyse/rules/elementwise.py", 't.pin_dim(x, dims_of(a["dim"], len(x.axes))[0], "cumulative operator")',
        "pass", "the axis of a running sum is not pinned",
        "test_operator_networks::test_its_class_is_proved_and_it_is_costed_and_resized[aten.cumsum]",
    ),
    Mutation(
        "vfx/analyse/rules/writes.py", 'order = np.argsort(np.concatenate([rest, written]), kind="stable")',
        "order = np.concatenate([rest, written])", "what is written into a part stands in the wrong places",
        "test_symmetry::test_groups_are_what_reason_finds",
    ),
    # operators
    Mutation(
        "vfx/operators/activations.py", '*_in_place("hardtanh", classes="clamp")',
        '*_in_place("hardtanh", classes="odd")', "signs pass a clamp from 0 to 6",
        "test_classes::test_the_class_of_each_group_is_found_and_true[hardtanh_of_unlike_bounds]",
    ),
    Mutation(
        "vfx/operators/calls.py", 'return 1 if is_product(node) or is_transposed(node) else 0',
        "return 1 if is_product(node) else 0", "a transposed convolution's outputs are looked for on the first axis",
        "test_layers::test_a_weight_without_one_slice_of_its_outputs_changes_that_channel_alone",
    ),
    # elements
    Mutation(
        "vfx/elements/composition.py", "return compose(symmetry, undone, permuted(back))",
        "return compose(symmetry, permuted(back), undone)", "an inverse does its two parts in the wrong order",
        "test_class_matching::test_elements_compose_and_undo test_action",
    ),
    Mutation(
        "vfx/elements/parts.py", "_block(dual if part.dual else element.matrix, part.block, 2)",
        "_block(element.matrix if part.dual else dual, part.block, 2)", "both sides of a map are exchanged",
        "test_action",
    ),
    Mutation(
        "vfx/elements/permutations.py", "rows = _rows(earlier, group)[_outer(then, group)]",
        "rows = _rows(earlier, group)", "orders inside blocks stay when the blocks move",
        "test_blocks::test_elements_form_a_group",
    ),
    Mutation(
        "vfx/elements/element.py",
        'return chosen / np.maximum(chosen.sum(-2, keepdims=True), 1) if role == "in" else chosen',
        "return chosen", "copies of a channel are summed where they are read",
        "test_transport::test_a_network_with_doubled_channels_is_transported_to_the_narrow_one "
        "test_transport::test_selection_without_a_coupling",
    ),
    # match
    Mutation(
        "vfx/match/coupling.py", "np.minimum(1, 1 / m / coupling.sum(0))", "np.minimum(1, 1 / n / coupling.sum(0))",
        "a coupling is rounded onto the marginal of the other side",
        "test_transport::test_exact_transport_is_the_cheapest_coupling",
    ),
    Mutation(
        "vfx/match/transport.py", "- 2 * cosine).clamp_min(0).sqrt().cpu().numpy()",
        "- 2 * cosine).clamp_min(0).cpu().numpy()", "a distance lacks its root",
        "test_transport::test_distances_are_those_of_activation_columns",
    ),
    Mutation(
        "vfx/match/transport.py", "return Element(nearest, plan * sizes[0], dual=plan * sizes[1])",
        "return Element(nearest, plan * sizes[1], dual=plan * sizes[0])",
        "a coupling is scaled by the widths of the wrong sides",
        "test_transport::test_a_network_with_doubled_channels_is_transported_to_the_narrow_one "
        "test_transport::test_the_narrow_network_fills_the_wide_one",
    ),
    Mutation(
        "vfx/match/zipit.py", "row = np.minimum(self.similarity[kept], self.similarity[gone])",
        "row = np.maximum(self.similarity[kept], self.similarity[gone])",
        "a merged cluster is as similar as its nearest part", "test_zipit::test_merges_are_those_of_the_definition",
    ),
    Mutation(
        "vfx/match/c2m3.py", 'pairs = gram.sum((0, 2)) - np.einsum("papb->ab", gram)', "pairs = gram.sum((0, 2))",
        "each edge counts as a pair with itself",
        "test_universe::test_the_line_search_finds_the_best_point_of_a_dense_grid",
    ),
    Mutation(
        "vfx/match/descent.py", "exact = self._exact(unit) and not quadratic and not inside",
        "exact = self._exact(unit) and not inside", "a step that may lower a quadratic objective is taken unchecked",
        "test_matching::test_a_group_on_both_axes_of_a_weight_never_loses_ground",
    ),
    Mutation(
        "vfx/match/linear.py", "lost = total - 2 * float((unmerge * between.T).sum())",
        "lost = total - float((unmerge * between.T).sum())", "the variance that comes back is understated",
        "test_linear_matching::test_the_objective_is_the_share_of_the_variance_that_comes_back",
    ),
    Mutation(
        "vfx/match/cca.py", "roots = (values.clamp_min(0) + self.gamma * (scale or 1.0)).sqrt()",
        "roots = values.clamp_min(0) + self.gamma * (scale or 1.0)", "covariances stand in the place of their roots",
        "test_cca::test_maps_are_those_of_the_formula",
    ),
    # normalize, and the passes that normalize
    Mutation(
        "passes/calibrate_normalization.py", 'shift = wanted_mean - mean * scale if kind == "repair"',
        'shift = wanted_mean - mean if kind == "repair"', "the shift of REPAIR forgets the scale",
        "test_normalization::test_each_method_is_its_formula_layer_by_layer",
    ),
    Mutation(
        "vfx/normalize/batch_norms.py", "weights[var] = observed.unbiased.to(weights[var])",
        "weights[var] = observed.std.square().to(weights[var])", "RESET writes the biased variance",
        "test_passes::test_reset_equals_the_naive_loop",
    ),
    Mutation(
        "vfx/normalize/biases.py", "depth > len(layers) - count", "depth >= len(layers) - count",
        "biases go from one layer more", "test_passes::test_bias_removal_counts_from_one_end",
    ),
    Mutation(
        "passes/calibrate_bias.py", "alpha ** (min(numbers) - 1)", "alpha ** min(numbers)",
        "biases are scaled once too often", "test_passes::test_bias_calibration_is_the_formula",
    ),
    Mutation(
        "passes/rescale_weights.py", "wanted = sum(a * float(t.abs().mean()) for",
        "wanted = sum(a * float(t.mean().abs()) for", "the magnitude wanted is that of the mean",
        "test_normalization::test_weights_get_the_edges_magnitude_back",
    ),
    # other passes and rewriting
    Mutation(
        "passes/align.py", "return behind * mean, behind.abs() * std", "return behind * mean, behind * std",
        "deviations behind a sign are negative", "test_class_matching::test_goals_go_through_the_maps",
    ),
    Mutation(
        "passes/align.py",
        "error = preserved(facts, program.weights[edge], exact_part(matching.elements[edge]), self.seed)",
        "error = preserved(facts, program.weights[0], exact_part(matching.elements[0]), self.seed)",
        "what was found is not proved, but the identity",
        "test_passes::test_a_permutation_that_changes_the_function_is_refused",
    ),
    Mutation(
        "passes/fold_gain.py", "factor = gain.offset + weights[gain.weight].double().reshape(-1)",
        "factor = weights[gain.weight].double().reshape(-1)", "a gain of 1 + γ is folded as γ",
        "test_fold_gain::test_the_function_stays_and_the_gains_go",
    ),
    Mutation(
        "passes/fold_normalization.py", "weights[bias].double() * scale + shift", "weights[bias].double() + shift",
        "a bias is not scaled with its weight", "test_passes::test_batchnorm_folds_into_its_layer",
    ),
    Mutation(
        "passes/duplicate_heads.py", "(1, next(iter(maps.values())).T)", "(1, next(iter(maps.values())))",
        "the way back into a head is transposed",
        "test_heads::test_maps_go_into_the_first_layer_of_a_head_where_that_is_exact test_heads",
    ),
    Mutation(
        "vfx/rewrite/contract.py", "replace(result.program, goals={}, notes=notes)",
        "replace(result.program, notes=notes)",
        "statistics outlive the values that they are of", "test_pass_orders",
    ),
    Mutation(
        "vfx/rewrite/averaging.py", "total = first * alphas[0]", "total = first.mul_(alphas[0])",
        "averaging writes into the first edge", "test_passes::test_a_pass_leaves_its_input_as_it_was",
    ),
    # reconstruct
    Mutation(
        "vfx/reconstruct/solve.py", "system.diagonal(dim1=1, dim2=2).add_(ridge * self.scale[:, None])",
        "system.diagonal(dim1=1, dim2=2).add_(ridge)", "the ridge depends on the units of a layer's inputs",
        "test_reconstruct_solutions::test_solutions_have_no_unit",
    ),
    Mutation(
        "vfx/reconstruct/solve.py", "float(departure.sum()) <= DEPARTURE * chosen.departure", "True",
        "a solution on all rows may leave the centre as far as it likes",
        "test_reconstruct_solutions::test_a_ridge_that_served_fewer_rows_well_does_not_let_the_solution_grow",
    ),
    Mutation(
        "vfx/checkpointing/journal.py", 'if head["key"] != key:', "if False:",
        "a file of another pass is taken for a layer's solution",
        "test_resuming::test_files_of_another_pass_or_damaged_ones_are_refused",
    ),
    Mutation(
        "vfx/reconstruct/forms.py",
        "weight = weight.reshape(g, -1, *weight.shape[1:]).transpose(1, 2).flip(list(range(3, 3 + self.rank)))",
        "weight = weight.reshape(g, -1, *weight.shape[1:]).transpose(1, 2)",
        "the kernel of a transposed convolution is not flipped",
        "test_reconstruct_forms::test_rows_times_the_matrix_are_what_the_call_gives",
    ),
    Mutation(
        "vfx/reconstruct/sweep.py", "return [step._replace(in_place=None) for step in plan]", "return plan",
        "a run ahead writes over values that it shares",
        "test_reconstruct::test_a_module_called_twice_is_solved_for_both_calls "
        "test_reconstruct::test_a_block_called_twice_is_solved_for_both_sums "
        "test_combine::test_regression_through_convolutions_norms_and_shared_layers "
        "test_reconstruct::test_values_that_wait_are_not_written_to_by_a_run_ahead",
    ),
    # combine
    Mutation(
        "vfx/combine/ties.py", "sizes.kthvalue(len(sizes) - count + 1)", "sizes.kthvalue(len(sizes) - count)",
        "one entry more is kept than asked for", "test_combine::test_a_method_computes_its_formula",
    ),
    Mutation(
        "vfx/combine/dare.py", "change / (1 - self.drop), 0.0)", "change, 0.0)", "what is kept is not rescaled",
        "test_combine::test_a_method_computes_its_formula",
    ),
    Mutation(
        "vfx/combine/grams.py", "self.off_diagonal * gram + (1 - self.off_diagonal) * diagonal",
        "self.off_diagonal * gram + diagonal", "the diagonal of a Gram matrix counts almost twice",
        "test_combine::test_regressions_compute_their_formula",
    ),
    Mutation(
        "vfx/combine/combiner.py", "sum(count * share * change for share, change",
        "sum(share * change for share, change",
        "task vectors are averaged instead of summed", "test_combine::test_a_method_computes_its_formula",
    ),
    # statistics
    Mutation(
        "vfx/statistics/moments.py", "self.m2 += m2 + shift**2 * (self.count * count / total)", "self.m2 += m2",
        "the variance between batches is lost", "test_statistics::test_moments_are_numpys_under_any_partition",
    ),
    Mutation(
        "vfx/statistics/moments.py", "return rows.clone() if rows.data_ptr() == x.data_ptr() else rows", "return rows",
        "features are centred in the network's own values",
        "test_statistics::test_rows_of_channels_are_no_view_of_the_activation",
    ),
    Mutation(
        "vfx/statistics/across.py", "return part.m2 + part.count * (part.mean - whole.mean) ** 2", "return part.m2",
        "the variance between processes is lost", "test_processes::test_moments_are_those_of_all_data",
    ),
    Mutation(
        "vfx/statistics/record.py", "            total.m2 *= 1 - self.momentum\n", "",
        "older batches' deviations do not fade", "test_normalization::test_momentum_lets_older_batches_fade",
    ),
    # pruning and resize
    Mutation(
        "vfx/pruning/scores/wanda.py", "abs().double() * squares.sqrt())", "abs().double() * squares)",
        "weights count by the square of their input's norm",
        "test_pruning_scores::test_input_norms_are_those_of_the_derivative "
        "test_pruning_scores::test_wanda_sums_over_the_calls_of_a_shared_layer "
        "test_pruning_scores::test_wanda_propagation",
    ),
    Mutation(
        "vfx/pruning/scores/sparsegpt.py", "weight[:, :, end:] -= errors @ factor[:, start:end, end:]",
        "weight[:, :, end:] += errors @ factor[:, start:end, end:]",
        "the columns behind a block are changed the wrong way",
        "test_layerwise_scores::test_sparsegpt_by_rows_is_the_optimal_brain_surgeons_steps",
    ),
    Mutation(
        "vfx/pruning/allocation/depth.py", "density = {target.name: sum(target.shape) / math.prod(target.shape)",
        "density = {target.name: 1 / math.prod(target.shape)", "all layers keep as many weights",
        "test_allocation::test_erdos_renyi_is_in_proportion_to_the_shape",
    ),
    Mutation(
        "vfx/pruning/clusters.py", 'mix = total if member.role == "in" else average', "mix = average",
        "what reads a merged channel reads a share of it",
        "test_channels::test_folding_copies_gives_the_network_back",
    ),
    Mutation(
        "vfx/pruning/masks.py", "chain.original.copy_(values[leaf])", "pass",
        "masks that are made permanent come undone",
        "test_pruning::test_masks_become_zeros_whatever_stands_behind_them",
    ),
    Mutation(
        "vfx/resize/program.py", "selected[gain].double() * torch.where(before > 0, after / before, 1.0)",
        "selected[gain].double()", "the gain of a weight norm forgets the inputs that went",
        "test_masked_proof::test_weight_norms_are_proved_without_their_rounding",
    ),
    Mutation(
        "vfx/resize/program.py", "_along(layout, gathers[min(e, len(gathers) - 1)], facts",
        "_along(layout, gathers[0], facts", "statistics of all edges follow the first one's choice of channels",
        "test_resize::test_goals_are_those_of_the_kept_channels "
        "test_resize::test_edges_keep_channels_of_their_own_but_as_many "
        "test_resize::test_goals_of_each_edge_are_those_of_its_own_channels",
    ),
    # diagnosis
    Mutation(
        "vfx/diagnosis/barrier.py", "torch.stack([logits.double().softmax(1) for logits in outputs]).mean(0)",
        "torch.stack([logits.double() for logits in outputs]).mean(0).softmax(1)",
        "the ensemble averages logits, not probabilities",
        "test_barrier::test_without_labels_the_ensemble_is_the_target",
    ),
    Mutation(
        "vfx/diagnosis/curve.py", "sign * ((1 - a) * values[0] + a * values[-1] - m)",
        "sign * (a * values[0] + (1 - a) * values[-1] - m)", "a barrier weighs its ends the wrong way round",
        "test_barrier::test_the_barrier_is_the_largest_gap_below_the_line",
    ),
    Mutation(
        "vfx/diagnosis/skew.py", "max(histogram) < UNEVEN * even and min(histogram) > even / UNEVEN",
        "max(histogram) < UNEVEN * even or min(histogram) > even / UNEVEN", "skewed data need two signs at once",
        "test_diagnosis::test_one_class_that_is_too_full_or_too_empty_is_enough",
    ),
    # data and capture
    Mutation(
        "vfx/data/mnist.py", "value=-dataset.mean / dataset.std)", "value=0.0)", "images are padded with grey",
        "test_data::test_mnist_in_every_layout",
    ),
    Mutation(
        "vfx/data/cifar.py", "rows[:, dataset.bytes_of_labels - 1]", "rows[:, 0]",
        "the coarse labels of CIFAR-100 are taken for the fine ones", "test_data::test_cifar_binary_files",
    ),
    Mutation(
        "vfx/data/preprocessing.py", "image.crop((left, top, left + width, top + height))",
        "image.crop((0, 0, width, height))", "a corner is cut out, not the middle",
        "test_data::test_images_become_inputs_as_torchvision_and_timm_do_it "
        "test_data::test_images_of_other_shapes_and_wishes",
    ),
    Mutation(
        "vfx/capture/in_place.py", 'if node.op in ("get_attr", "placeholder"):', 'if node.op == "get_attr":',
        "a network that writes into its input changes the user's",
        "test_trace::test_running_a_program_changes_neither_inputs_nor_buffers",
    ),
    Mutation(
        "vfx/capture/builder.py", "key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)",
        "key = (tensor.data_ptr(), tuple(tensor.shape), tensor.dtype)", "a weight and its transpose are one tensor",
        "test_trace::test_a_weight_and_its_transpose_are_two_tensors",
    ),
    # emit
    Mutation(
        "vfx/emit/scales.py", 'factor = a["scale"] * sqrt(a["query"].meta["val"].shape[-1])',
        'factor = a["scale"] * a["query"].meta["val"].shape[-1]', "queries take up a scale without its root",
        "test_own_class::test_what_a_new_width_does_to_the_scale_of_attention_goes_into_the_queries",
    ),
    Mutation(
        "vfx/emit/taking.py", "given = tensor.detach().to(dtype or tensor.dtype, copy=True)",
        "given = tensor.detach().to(dtype or tensor.dtype)",
        "a module shares its tensors with the networks it comes from",
        "test_memory::test_no_result_shares_a_tensor_with_what_it_was_made_of",
    ),
    Mutation(
        "vfx/emit/sharding.py", "if shard and size + tensor.nbytes > most:", "if shard and size > most:",
        "a shard is larger than asked for", "test_shards::test_what_is_written_in_shards_is_read_again",
    ),
    # models and pages
    Mutation(
        "vfx/models/resnet20.py", "module.conv1.weight.mul_(blocks**-0.5)", "module.conv1.weight.mul_(blocks**-1)",
        "the branches of Fixup start too small",
        "test_models::test_fixup_scales_the_first_convolution_by_the_number_of_blocks",
    ),
    Mutation(
        "vfx/pages/curves.py", "best[count] = min(rows) if rows else None", "best[count] = max(rows) if rows else None",
        "a curve of the best candidates shows the worst",
        "test_pages::test_candidates_are_drawn_over_the_layers_that_are_kept",
    ),
    # api, cli and the rest
    Mutation(
        "vfx/alphas.py", "return [1 - float(weights), float(weights)] if single",
        "return [float(weights), 1 - float(weights)] if single",
        "α weighs the first edge", "test_merge::test_one_number_is_the_weight_of_the_second_edge",
    ),
    Mutation(
        "vfx/api/budgets.py", "return all(merged.ratio(whole)[name] <= limit",
        "return any(merged.ratio(whole)[name] <= limit",
        "one limit of a budget is enough",
        "test_pfm::test_a_budget_of_two_figures_keeps_both",
    ),
    Mutation(
        "vfx/api/restoring.py", "scores |= {label: joined(tried[label] + each)", "scores |= {label: joined(each)",
        "a second look forgets the first", "test_channel_choice::test_the_second_look_decides_with_the_first "
        "test_channel_choice::test_the_second_look_does_not_forget_the_first",
    ),
    Mutation(
        "vfx/choice.py", "return score.better_than(rival) and rival.value - score.value > MARGIN * abs(rival.value)",
        "return score.better_than(rival)", "a network outside the user's class wins by a hair",
        "test_solving::test_leaving_the_user_s_class_takes_a_margin",
    ),
    Mutation(
        "vfx/cli/recipe.py", "return replace(recipe, options=defaults | recipe.options)",
        "return replace(recipe, options=recipe.options | defaults)", "defaults win over what a recipe says",
        "test_recipes::test_what_a_recipe_says_wins_over_the_defaults",
    ),
    Mutation(
        "vfx/cli/inputs.py", 'name = match if match != "auto" else "activation" if data else "weight"',
        'name = match if match != "auto" else "activation"', "the first layers are matched by data that are not there",
        "test_cli::test_the_first_layers_are_matched_by_what_there_is",
    ),
    Mutation(
        "vfx/proof.py", "if x.shape != y.shape or x.dtype != y.dtype:", "if x.shape != y.shape:",
        "outputs of another type pass for the same", "test_proof::test_every_output_counts",
    ),
    Mutation(
        "vfx/judge.py", "torch.special.xlogy(p, p) - torch.special.xlogy(p, q.clamp(SURE, 1))",
        "torch.special.xlogy(q, q) - torch.special.xlogy(q, p.clamp(SURE, 1))",
        "a divergence is taken the other way round",
        "test_solving::test_yes_and_no_are_judged_by_their_logits",
    ),
)  # fmt: skip

# the facts of the registry: which tests notice that no operator has one any more
FACTS = {
    "names": "test_operator_classes::test_documented_aliases_have_one_name",
    "ties": "test_layers test_symmetry::test_roles",
    "classes": "test_classes::test_the_class_of_each_group_is_found_and_true",
    "space": "test_blocks::test_blocks_are_what_reason_finds",
    "resize": "test_resize::test_every_hazard_at_half_its_channels",
    "cost": "test_cost::test_batch_norm_row",
    "roles": "test_products::test_products_are_numbered_with_the_channel_axis_of_their_outputs",
    "spatial": "test_operator_networks::test_its_class_is_proved_and_it_is_costed_and_resized[aten.max_pool2d]",
    "rank": "test_operator_networks::test_channels_pass_operators_on_positions[atleast]",
    "gates": "test_emitted_modules::test_every_layer_is_the_users_under_the_users_name",
    "exponent": "test_balance::test_writers_and_readers_of_each_free_scale test_balance::test_the_function_stays",
    "fills": "test_exported_programs::test_a_constant_that_asks_for_any_memory_is_refused test_trace",
    "least": "test_masked_proof::test_as_many_channels_stay_as_operators_need",
    "norm": "test_fold_gain::test_the_function_stays_and_the_gains_go",
    "layer": "test_layers::test_layers_are_numbered_in_execution_order",
    "module": "test_emitted_modules::test_every_layer_is_the_users_under_the_users_name",
    "in_double": "test_experts",
    "moves": "test_left_out",
    "keeps_parts": "test_parts",
    "reads_all": "test_operator_networks::test_its_class_is_proved_and_it_is_costed_and_resized[aten.logsumexp]",
    "contracts": "test_masked_proof",
    "multiplies": "test_products::test_products_are_numbered_with_the_channel_axis_of_their_outputs",
    "batched": "test_balance::test_attention_keeps_its_function "
    "test_balance::test_queries_and_keys_are_singular_vectors "
    "test_heads",
    "is_add": "test_residual_blocks::test_blocks_are_found_from_the_graph",
    "is_affine": "test_normalization::test_activations_behind_transpositions_adds_and_layers",
    "is_additive": (
        "test_symmetry::test_a_parameter_that_is_added_makes_the_feature_and_one_that_multiplies_it_scales_it"
    ),
    "is_cast": "test_classes::test_the_class_of_each_group_is_found_and_true[rms_norm_of_squares_cast]",
    "is_copy": "test_classes::test_the_class_of_each_group_is_found_and_true[rms_norm_of_squares_copied]",
    "is_pool": "test_activations::test_a_pool_in_front_of_the_activation_is_walked_through",
    "is_magnitude": "test_rectangular::test_a_narrow_network_keeps_its_function_in_a_wide_one[rms_norm_by_hand]",
    "averages": "test_center_stream::test_mixing_tokens_behind_an_activation_keeps_the_mean "
    "test_fold_gain::test_the_function_stays_and_the_gains_go",
    "divides_by_count": "test_rectangular::test_a_narrow_network_keeps_its_function_in_a_wide_one[rms_norm_by_hand]",
    "gives_positions": "test_operator_networks::test_its_class_is_proved_and_it_is_costed_and_resized[aten.argmax]",
    "hands_on": "test_statistics::test_every_tap_of_a_residual_stream_is_read "
    "test_own_class::test_what_a_new_width_does_to_the_scale_of_attention_goes_into_the_queries",
    "interpolates": "test_proof_extent",
    "runs_in_place": "test_program",
    "may_return_input": "test_trace::test_what_returns_its_input_is_written_to_with_it",
    "is_input": "test_trace::test_values_that_are_detached_are_these_values",
    "asserts": "test_trace::test_what_is_asserted_computes_nothing",
    "linear_time": "test_trace::test_a_large_mask_that_takes_little_time_is_a_constant",
}


def emptied(fact: Field[Any]) -> Mutation:
    """The registry without one of its facts; of ``names`` the first is left, without which there is no entry."""
    if fact.name == "names":
        value = "entry.names[:1]"
    elif fact.default is not MISSING:
        value = repr(fact.default)
    else:
        value = repr(UNKNOWN if fact.default_factory is MISSING else fact.default_factory())
    loop = "    for entry in entries:\n"
    new = loop.replace(
        "entries", f'(__import__("dataclasses").replace(entry, {fact.name}={value}) for entry in entries)'
    )
    return Mutation("vfx/operators/registry.py", loop, new, f"no operator has {fact.name!r}", FACTS[fact.name])


MUTATIONS = (*CHANGES, *map(emptied, fields(Operator)))
