"""Bugs of rewards, advantages, GAE, whitening and groups."""
# ruff: noqa: E501

from mutants.plant import Mutant

LOOP = "test_returns.py::test_it_is_a_loop_over_the_row_with_its_hidden_tokens_cut_out"
GROUPS = "test_groups.py::test_advantages_of_a_group_are_their_loop_over_the_kept_samples"
WHITEN = "test_rewards.py::test_whiten_is_that_of_a_loop"
MUTANTS = (
    Mutant("A01", "the next value is that of the next column, masked or not", "verl 50, 1850, ROLL 447", "returns", "return suffix_scan(kept, held)[..., 1:]", "return _past(x, past)[..., 1:]", LOOP),
    Mutant("A02", "an observation of a tool decays the credit", "verl 2337, miles 1827", "returns", "held = _past(torch.where(mask, decay, 1.0), None)", "held = _past(decay.expand(mask.shape), None)", LOOP),
    Mutant("A02", "an observation of a tool ends the credit", "verl 2337", "returns", "held = _past(torch.where(mask, decay, 1.0), None)", "held = _past(torch.where(mask, decay, 0.0), None)", LOOP),
    Mutant("A03", "the score stands one slot past the end", "TRL 1893, 3750, 5338", "rewards", "return torch.where(mask & (_later(mask) == 0), score, 0.0)", "return torch.where((mask & (_later(mask) == 0)).roll(1, -1), score, 0.0)", "test_rewards.py::test_shape_rewards_is_a_penalty_on_kept_tokens_and_the_score_on_the_last"),
    Mutant("A03", "the score stands at the end of the padding", "DeepSpeedExamples 672", "rewards", "return torch.where(mask & (_later(mask) == 0), score, 0.0)", "return torch.where(torch.arange(mask.shape[-1]) == mask.shape[-1] - 1, score, 0.0)", "test_rewards.py::test_an_attributed_score_is_the_sum_of_its_rewards"),
    Mutant("A05", "what is hidden is not 0 after whitening", "verl 1527", "rewards", "torch.where(mask, white + mean, 0.0)", "white + mean", f"{WHITEN} test_rewards.py::test_whiten_never_reads_what_the_mask_hides_forward_or_backward"),
    Mutant("A05", "Bessel's n − 1 is 0 for one value", "ROLL 475, 476", "rewards", "(centred.square().sum() / number + eps).rsqrt()", "(centred.square().sum() / (number - 1) + eps).rsqrt()", WHITEN),
    Mutant("A05", "hidden steps count in the statistics", "ray 63900", "rewards", "    number = mask.sum().clamp(min=1)\n", "    number = mask.numel()\n", WHITEN),
    Mutant("A05", "statistics are of each row", "miles 3229", "rewards", "mean = x.sum() / number", "mean = x.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)", WHITEN),
    Mutant("A07", "the std of one sample is NaN", "DeepAnalyze 116", "groups", "/ (number - ddof).clamp(min=1)", "/ (number - ddof)", "test_groups.py::test_advantages_of_equal_rewards_are_exactly_zero_with_a_finite_gradient"),
    Mutant("A07", "a sample alone has its raw reward for an advantage", "verl 3635", "groups", "return _centred(rewards, mask)[0]\n", "centred, number = _centred(rewards, mask)\n    return torch.where(number > 1, centred, rewards)\n", GROUPS),
    Mutant("A08", "groups are taken along the other axis", "AReaL 1419, slime 1918, NeMo-RL 2176", "groups", "relative - relative.sum(-1, keepdim=True) / number, 0.0), number", "relative - relative.sum(0, keepdim=True) / number, 0.0), number", "test_groups.py::test_advantages_of_a_prompt_do_not_depend_on_the_other_prompts"),
    Mutant("A08", "a group that lacks a sample is divided by the size of a whole one", "AReaL 1419", "groups", "    number = mask.sum(-1, keepdim=True).clamp(min=1)\n    return torch.where(mask, relative", "    number = torch.full_like(mask[..., :1].long(), mask.shape[-1])\n    return torch.where(mask, relative", GROUPS),
    Mutant("A08", "answers are scored by the record of another prompt", "NeMo-RL 2176", "grpo", 'roles.score(rollout, repeat(asked.records, "p -> (p g)", g=group))', 'roles.score(rollout, repeat(asked.records, "p -> (g p)", g=group))', "test_recipes.py::test_a_reward_is_told_which_record_each_answer_is_for"),
    Mutant("A08", "the answers of a prompt do not stand together", "slime 1918", "grpo", 'rearrange(x, "(p g) t -> p g t", g=group)', 'rearrange(x, "(g p) t -> p g t", g=group)', "test_recipes.py::test_the_answers_of_a_prompt_stand_together"),
    Mutant("A10", "rounding is divided by ε where all rewards are equal", "NeMo-RL 1519", "groups", "return torch.where(mask, rewards - first, 0.0), mask", "return torch.where(mask, rewards, 0.0), mask", "test_groups.py::test_advantages_of_equal_rewards_are_exactly_zero_with_a_finite_gradient"),
    Mutant("A12", "one NaN poisons its group in silence", "ms-swift 8123, TRL 5773, 5775", "groups", '    checks.finite(rewards, mask, name="rewards")\n    first', "    first", "test_groups.py::test_rewards_that_would_poison_their_group_are_refused_by_position"),
    Mutant("A12", "a score that is NaN goes into the returns in silence", "TRL 5773", "rewards", '    checks.finite(score, mask.any(-1), name="score")\n', "", "test_rewards.py::test_a_score_that_is_not_finite_is_named_by_its_row_unless_the_row_is_padding"),
    Mutant("A13", "a reward of 0 counts as none", "OpenRLHF 1219", "groups", "torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask", "rewards != 0 if mask is None else mask", "test_groups.py::test_a_whole_group_needs_no_mask"),
    Mutant("A14", "advantages are normalised twice", "axon-rl/gem 113, reskill 12", "groups", "    return centred / torch.where(scale > 0, scale, 1.0)", "    scaled = centred / torch.where(scale > 0, scale, 1.0)\n    return scaled / (_std(scaled, number, ddof) + eps)", GROUPS),
    Mutant("A14", "advantages are normalised by group and then by batch", "axon-rl/gem 113", "batch_advantages", "centred = dr_grpo_advantages(rewards, mask.any(-1))", "centred = grpo_advantages(rewards, mask.any(-1), ddof=1, eps=eps)", "test_batch_advantages.py::test_reinforce_pp_with_a_baseline_weighs_every_kept_token_the_same"),
    Mutant("A15", "one sample per prompt teaches nothing, in silence", "OpenRLHF 1250, ms-swift 4348", "groups", "rewards.shape[-1] < 2", "rewards.shape[-1] < 1", "test_groups.py::test_a_group_too_small_to_compare_is_refused"),
    Mutant("A17", "a row that was cut off counts as ended", "torchrl 2773, 4209", "returns", "last = torch.zeros_like(x[..., :1].sum(-1)) if past is None else past", "last = torch.zeros_like(x[..., :1].sum(-1))", "test_returns.py::test_a_row_cut_in_two_and_bootstrapped_is_the_row_uncut"),
    Mutant("A17", "a row that ended goes on into the next", "torchrl 4210, Mava 951", "returns", "last = torch.zeros_like(x[..., :1].sum(-1)) if past is None else past", "last = x[..., 0].roll(-1, 0) if past is None else past", LOOP),
    Mutant("A18", "the mean of an answer counts what is masked", "AReaL 1346", "sequence", "mask.sum(-1).clamp(min=1)", "mask.shape[-1]", "test_sequence.py::test_masked_reductions_are_their_loops"),
    Mutant("A20", "the weights of several rewards are not read", "TRL 5353", "shaping", "* weights.to(rewards.dtype)).sum(-1)", "* 1.0).sum(-1)", "test_shaping.py::test_combined_reward_is_the_weighted_sum_of_the_rewards_there_are"),
    Mutant("A20", "the weights of several objectives are not read", "TRL 5353", "batch_advantages", "(torch.stack(each, -1) * weights.to(rewards.dtype)).sum(-1)", "torch.stack(each, -1).sum(-1)", "test_batch_advantages.py::test_gdpo_advantages_normalise_each_reward_then_their_sum"),
)  # fmt: skip
ELSEWHERE = {}
