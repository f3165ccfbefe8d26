"""Bugs of accumulation, ranks, schedules and the optimizer."""
# ruff: noqa: E501

from mutants.plant import Mutant

SPLIT = "test_steps.py::test_a_step_does_not_depend_on_how_its_batch_is_split"
PARTS = "test_steps.py::test_every_row_is_used_once_whatever_the_number_of_parts"
MUTANTS = (
    Mutant("D01", "the mean over parts, and not over the tokens of all", "transformers 24725, 34191, verl 3332, NeMo-RL 86, TRL 2615, 3716", "steps", "        return sums\n", "        return tree.map(lambda x: x / (1 + len(others)), sums)\n", SPLIT),
    Mutant("D03", "parts are scaled by the number that was asked for", "verl 141, TRL 6024, 5890", "steps", "        return sums\n", "        return tree.map(lambda x: x * ((1 + len(others)) / microbatches), sums)\n", PARTS),
    Mutant("D03", "a part that is shorter is left out", "verl 141", "steps", "for i in range(0, count, size)]", "for i in range(0, count - size + 1, size)]", f"{PARTS} {SPLIT}"),
    Mutant("D04", "metrics are averaged over parts", "TRL 6380, 5620", "steps", "        return sums\n", "        grads, (total, metrics) = sums\n        return grads, (total, {name: x / (1 + len(others)) for name, x in metrics.items()})\n", SPLIT),
    Mutant("D05", "all but the last part's gradient is dropped", "open-instruct 1498, NeMo-RL 3660", "steps", "sums = tree.add(sums, gradient(params, part, fold_in(key, i)))", "sums = gradient(params, part, fold_in(key, i))", SPLIT),
    Mutant("D07", "the schedule is one update ahead", "NeMo-RL 305", "optim", "return lr(count) if callable(lr) else lr", "return lr(count + 1) if callable(lr) else lr", "test_optim.py::test_an_optimizer_asks_its_schedule_for_the_number_of_updates_before"),
    Mutant("D07", "a schedule forgets where it ends", "verl 1400", "optim", "end + (peak - end) * falling", "peak * falling", "test_optim.py::test_a_schedule_is_its_closed_form"),
    Mutant("D07", "two updates are counted for one", "DeepSpeedExamples 756", "optim", "rate, count = _rate(lr, state.count), state.count + 1", "rate, count = _rate(lr, state.count), state.count + 2", "test_optim.py::test_an_optimizer_asks_its_schedule_for_the_number_of_updates_before test_optim.py::test_adamw_is_torch_adamw"),
    Mutant("D09", "some rows come twice an epoch and some never", "DeepSpeedExamples 804, trlx 276, 315", "data", "epoch: random.permutation(random.fold_in(key, epoch), rows), step", "epoch: random.bits(random.fold_in(key, epoch), (rows,)) % rows, step", "test_data.py::test_every_row_comes_exactly_once_in_every_epoch"),
    Mutant("D09", "a record is held out and trained on", "trlx 276", "data", "if name not in held]", "if name not in held or name < names[0]]", "test_data.py::test_no_record_is_held_out_and_kept"),
    Mutant("D11", "padding rows count in the mean over sequences", "rllm 508", "weights", "_at_least_one((lengths > 0).sum())", "_at_least_one((lengths >= 0).sum())", "test_ground.py::test_rows_and_tokens_that_are_padding_change_no_weight"),
    Mutant("D11", "padding rows count under a fixed length", "rllm 508", "weights", "(length * _at_least_one(mask.any(-1).sum()))", "(length * mask[..., 0].numel())", "test_ground.py::test_rows_and_tokens_that_are_padding_change_no_weight"),
    Mutant("D12", "a gradient that is NaN counts as finite", "verl 789", "steps", "total.isfinite() & norm.isfinite()\n        new", "total.isfinite()\n        new", "test_steps.py::test_a_gradient_that_is_not_finite_is_counted_under_a_finite_loss"),
    Mutant("D12", "a run goes on with a gradient that is NaN", "verl 789", "train", 'if values.pop("finite", 1.0) != 1.0:', 'if values.pop("finite", 1.0) > 1.0:', "test_train.py::test_a_gradient_that_is_not_finite_ends_the_run"),
    Mutant("D12", "a run goes on with a loss that is NaN", "verl 789", "train", "if not math.isfinite(value)]", "if math.isinf(value)]", "test_train.py::test_a_non_finite_metric_ends_the_run_and_keeps_the_last_checkpoint"),
    Mutant("D14", "what is measured keeps the graph of what is trained", "TRL 3337", "steps", "return tree.stop(metrics | {", "return dict(metrics | {", "test_steps.py::test_metrics_carry_no_graph_even_from_parameters_that_require_gradients"),
    Mutant("D14", "a draw depends on who else has drawn", "TRL 3337", "random", "return (bits(key, shape).to(torch.float64) + 0.5) * 2.0**-32", "return (bits(key.roll(1, 0), shape).to(torch.float64) + 0.5) * 2.0**-32", "test_distributions.py::test_a_draw_depends_on_its_own_row_and_key_alone"),
    Mutant("D02", "what ranks add is averaged", "torchtune 2172, open-instruct 1161, verl 3994", "ranks", "        dist.all_reduce(flat, group=group)\n", "        dist.all_reduce(flat, group=group)\n        flat = flat / place(group).ranks\n", "test_ranks.py::test_any_number_of_ranks_takes_the_steps_of_one_process"),
    Mutant("D02", "all layers are gathered before the first computes", "", "recompute", "if not layer_of(name)}", "if not layer_of(name) or True}", "test_budget.py::test_a_rank_gathers_as_much_by_layer"),
    Mutant("D02", "a rank takes no turn once its own rows have stopped", "", "sampler", "some=lambda alive: anywhere(bool(alive.any()))", "some=lambda alive: bool(alive.any())", "test_layers.py::test_layers_that_are_gathered_for_every_token_draw_what_whole_parameters_draw"),
    Mutant("D09", "held-out rows that a rank borrowed count", "DeepSpeedExamples 804, trlx 276, 315", "offline", "sum_over_ranks(metrics if any_here else tree.zeros_like(metrics))", "sum_over_ranks(metrics)", "test_layers.py::test_held_out_rows_are_read_by_a_rank_each_whether_prompts_are_shared_or_not"),
    Mutant("D02", "a row that a rank borrowed counts", "torchtune 2172, open-instruct 1161, verl 3994", "sharding", "return 0 * total, tree.zeros_like(metrics)", "return total, metrics", "test_sharding.py::test_any_number_of_shards_takes_the_steps_of_whole_parameters"),
)  # fmt: skip
ELSEWHERE: dict[str, str] = {}
