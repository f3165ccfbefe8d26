"""Bugs of tokens, masks, padding, truncation and templates."""
# ruff: noqa: E501

from mutants.plant import Mutant

PADDING = "test_models.py::test_logits_do_not_depend_on_padding_and_are_those_of_transformers"
FRAME = "test_data.py::test_an_example_is_bos_prompt_completion_eos_cut_at_the_end"
SHARED = "test_prefix.py::test_every_decoder_has_the_same_loss_and_gradient"
STOP = "test_rollout.py::test_the_mask_ends_with_the_first_stop"
MUTANTS = (
    Mutant("M01", "attention is inferred from the pad id, which is the end's", "TRL 976, 734, 3200, 6357", "data", "row([True] * len(e.tokens), False)", "row([token != pad for token in e.tokens], False)", "test_data.py::test_padding_is_undone_by_attention_whatever_the_pad_id"),
    Mutant("M01", "the end is not a label where it is the pad id", "transformers 23530, 22794", "data", "row(e.mask, False)", "row([m and token != pad for m, token in zip(e.mask, e.tokens)], False)", "test_data.py::test_padding_is_undone_by_attention_whatever_the_pad_id"),
    Mutant("M02", "the stop itself is masked out and never credited", "OpenRLHF 181", "rollout", ", index] = alive\n", ", index] = alive & ~torch.isin(drawn, stops)\n", STOP),
    Mutant("M02", "pads after the stop are trained", "verl 3805", "rollout", ", index] = alive\n", ", index] = True\n", "test_rollout.py::test_rows_that_have_stopped_are_read_no_more_once_they_are_half"),
    Mutant("M03", "padding is attended to in the forward pass of the loss", "TRL 2708, trlx 108", "skeletons", '"attention_mask": attention_mask(rows, causal=bare.causal)', '"attention_mask": attention_mask(torch.ones_like(rows), causal=bare.causal)', PADDING),
    Mutant("M03", "padding is attended to while sampling", "TRL 2708", "decoding", "mask = attention_mask(attention, causal=True)", "mask = attention_mask(torch.ones_like(attention), causal=True)", "test_decoding.py::test_what_padding_holds_and_how_much_there_is_changes_nothing"),
    Mutant("M05", "positions count the padding", "TRL 469, 6800, trlx 509, OpenRLHF 217, NeMo-Aligner 68", "skeletons", "positions(rows) + bare.offset", "torch.arange(rows.shape[-1]).expand_as(rows) + bare.offset", PADDING),
    Mutant("M05", "positions count the padding while sampling", "TRL 6800", "decoding", "positions(attention)[:, -1:]", "torch.full_like(tokens[:, None], index)", "test_decoding.py::test_decoding_token_by_token_gives_the_logits_of_the_whole"),
    Mutant("M07", "pads are labels", "TRL 1625, axolotl 2227, DeepSpeedExamples 819", "data", "row(e.mask, False)", "row(e.mask, True)", "test_data.py::test_padding_is_undone_by_attention_whatever_the_pad_id"),
    Mutant("M08", "the prompt is part of the completion", "OpenRLHF 235, 237, TRL 1705", "data", "[i >= len(before) for i in range(len(tokens))]", "[True for i in range(len(tokens))]", FRAME),
    Mutant("M08", "the prompt is part of the rollout", "Megatron-Bridge 5959", "rollout", "(end, device=attention.device) >= start", "(end, device=attention.device) >= 0", STOP),
    Mutant("M08", "the prompt counts in the log-probs of DPO", "OpenRLHF 237", "pair_losses", "mask = batch.mask &", "mask = batch.attention &", "test_pair_recipes.py::test_what_the_masks_and_the_weights_hide_is_never_read"),
    Mutant("M10", "a second beginning before a text that has one", "TRL 1591, axolotl 1616, 1733, NeMo-RL 747", "data", "tokens[:1] != [encoder.bos]:\n        tokens = [encoder.bos, *tokens]\n    if encoder.bos is not None and", "True:\n        tokens = [encoder.bos, *tokens]\n    if False and", FRAME),
    Mutant("M10", "two beginnings in a text are let through", "NeMo-RL 855, reward-bench 164", "data", "tokens[:2] == [encoder.bos, encoder.bos]", "tokens[:2] == [encoder.bos, None]", "test_data.py::test_two_bos_or_nothing_to_begin_with_is_a_tokenizer_error"),
    Mutant("M10", "a tokenizer writes its own beginning, too", "NeMo-RL 835, 962", "data", "add_special_tokens=False", "add_special_tokens=True", "test_data.py::test_real_tokenizers_frame_every_text_once"),
    Mutant("M11", "a second end after a text that has one", "TRL 4908", "data", "if after[-1:] != [encoder.eos]:", "if True:", FRAME),
    Mutant("M11", "no end", "TRL 3091", "data", "if after[-1:] != [encoder.eos]:", "if False:", FRAME),
    Mutant("M13", "what no answer fits into is trained on its prompt", "TRL 3398", "data", "if len(tokens) <= len(before):", "if not tokens:", FRAME),
    Mutant("M13", "the end of the tokens is kept with the beginning of the mask", "TRL 3398, 1033", "collate", "x.mask[:head] + x.mask[at:]", "x.mask[: len(x.mask) - at + head]", "test_collate.py::test_the_ends_that_are_kept_have_one_prompt_and_begin_as_they_did"),
    Mutant("M15", "the stop disappears between sampling and training", "Megatron-Bridge 5959", "rollout", "= torch.where(alive, drawn, pad)", "= torch.where(alive & ~torch.isin(drawn, stops), drawn, pad)", STOP),
    Mutant("M15", "another prompt is read than the one that is trained on", "TRL 5242, NeMo-RL 1337", "rollout", "decoder.prefill(params, prompts.tokens,", "decoder.prefill(params, prompts.tokens ^ 1,", "test_rollout.py::test_logprobs_are_those_of_a_full_forward"),
    Mutant("M16", "the examples packed into a row are one", "TRL 805, 1230, 3526", "weights", "lengths = turn_sum(kept, segments, mask)", "lengths = kept.sum(-1, keepdim=True).expand_as(kept)", "test_distillation.py::test_segment_mean_weighs_every_example_of_packed_rows_the_same"),
    Mutant("M18", "prompts are padded on the right", "DeepSpeedExamples 457, LlamaFactory 2382", "data", 'side="left", pad=pad, length=length', 'side="right", pad=pad, length=length', "test_data.py::test_prompts_are_padded_on_the_left"),
    Mutant("M18", "prompts with padding on the right are sampled from", "LlamaFactory 2382", "rollout", "bad = gaps.any(-1) | ~prompts.attention.any(-1)", "bad = ~prompts.attention.any(-1)", "test_rollout_refuses.py::test_wrong_prompts_and_keys_raise"),
    Mutant("M20", "what a weight of 0 hides is multiplied by it", "verl 2377", "weights", "(weights * torch.where(weights != 0, x, 0.0)).sum()", "(weights * x).sum()", "test_ground.py::test_weighted_sum_never_reads_where_the_weight_is_zero"),
    Mutant("M20", "what a mask hides is multiplied by it", "verl 2377", "sequence", "return torch.where(mask, x, 0.0).sum(-1)", "return (x * mask).sum(-1)", "test_contract.py::test_it_never_reads_what_its_mask_hides[nan-masked_sum]"),
    Mutant("M20", "NaN under a mask goes into the reward", "verl 2377", "rewards", "torch.where(mask, logprobs, 0.0) - torch.where(mask, ref_logprobs, 0.0)", "(logprobs - ref_logprobs) * mask", "test_rewards.py::test_shape_rewards_never_reads_what_the_mask_hides_forward_or_backward"),
    Mutant("M21", "no kept token is 0/0 in a mean over tokens", "verl 782, NeMo-RL 166, OpenRLHF 583", "weights", "    return count.clamp(min=1)\n", "    return count\n", "test_ground.py::test_token_mean_weighs_every_kept_token_the_same test_ground.py::test_rows_and_tokens_that_are_padding_change_no_weight"),
    Mutant("M21", "no kept token is 0/0 in the mean of an answer", "open-instruct 1685", "sequence", "mask.sum(-1).clamp(min=1)", "mask.sum(-1)", "test_sequence.py::test_masked_reductions_are_their_loops"),
    Mutant("M21", "no kept token is 0/0 in whitening", "verl 782", "rewards", "    number = mask.sum().clamp(min=1)\n", "    number = mask.sum()\n", "test_rewards.py::test_whiten_is_that_of_a_loop"),
    Mutant("M22", "a mask is taken for weights", "verl 2506, 2513", "weights", "    checks.floating(weights=weights)\n", "", "test_misuse.py::test_a_wrong_dtype_is_refused"),
    Mutant("M23", "the rows of a part are those of another", "verl 1440", "steps", "x[i : i + size], batch)", "x[i : i + size] if x.dtype != torch.bool else x[: len(x[i : i + size])], batch)", "test_steps.py::test_a_step_does_not_depend_on_how_its_batch_is_split"),
    Mutant("M23", "the masks of a minibatch are those of other rows", "verl 1440", "ppo", "yield Experience(*(x[rows] for x in data))", "yield Experience(*(x[: len(rows)] if x.dtype == torch.bool else x[rows] for x in data))", "test_ppo.py::test_a_method_teaches_what_is_rewarded"),
    Mutant("M25", "the reward is read as if padding were on the right", "TRL 937, 2778", "heads", "last = torch.where(attention, step, 0).amax(-1)", "last = attention.sum(-1) - 1", "test_heads.py::test_pools_read_the_tokens_of_their_row_and_nothing_else"),
    Mutant("M25", "the reward is read one token early", "gpt-neox 1285", "heads", "last = torch.where(attention, step, 0).amax(-1)", "last = (torch.where(attention, step, 0).amax(-1) - 1).clamp(min=0)", "test_heads.py::test_the_reward_of_a_row_does_not_depend_on_padding test_heads.py::test_pools_read_the_tokens_of_their_row_and_nothing_else"),
    Mutant("M03", "what a prefix is padded with is read by what comes after it", "TRL 2708", "models", "whole = joined(attention)", "whole = joined(attention._replace(prefix=attention.prefix | True))", SHARED),
    Mutant("M03", "answers do not read the prompt that they share", "", "models", "whole = joined(attention)", "whole = joined(attention._replace(prefix=attention.prefix & False))", SHARED),
    Mutant("M05", "positions begin again after a prefix", "", "models", "positions(whole)[:, width:]", "positions(attention.rows)", SHARED),
    Mutant("M16", "answers read the prompt of another group", "", "prefix", "x[:, None].expand(-1, group, *x.shape[1:])", "x[None].expand(group, *x.shape)", SHARED),
    Mutant("M16", "answers have the embeddings of others", "", "models", "rest.unflatten(0, tokens.rows.shape)", "rest.flip(0).unflatten(0, tokens.rows.shape)", SHARED),
    Mutant("M16", "an encoder reads answers by a prompt that did not see them", "", "models", "if not bare.causal:", "if False:", "test_prefix.py::test_an_encoder_whose_prompts_see_the_answers_reads_whole_rows"),
    Mutant("M03", "a score pools its answer alone, without the prompt that is shared", "", "prefix", "torch.cat([each_of(x.prefix, x.rest.shape[1]), x.rows], -1)", "torch.cat([each_of(x.prefix, x.rest.shape[1]) & False, x.rows], -1)", "test_prefix.py::test_scores_of_pairs_have_the_same_loss_and_gradient"),
    Mutant("M18", "answers lose their last tokens where a shorter prompt begins later", "", "collate", "column, answers = longest.max() - (longest - prompts).max()", "column, answers = longest.max() - (longest - prompts).min()", "test_collate.py::test_answers_are_padded_and_nothing_else_happens_to_them"),
    Mutant("M18", "rows begin together, and prompts of all lengths are read for each answer", "", "collate", "start = (column - prompts).clamp(min=0)", "start = (column - prompts).clamp(max=0, min=0)", "test_collate.py::test_prompts_of_all_lengths_are_read_once"),
    Mutant("M10", "a text that is cut loses its beginning", "", "collate", "Example(x.tokens[:head] + x.tokens[at:], x.mask[:head] + x.mask[at:])", "Example(x.tokens[at:], x.mask[at:])", "test_collate.py::test_the_ends_that_are_kept_have_one_prompt_and_begin_as_they_did"),
    Mutant("M13", "each answer keeps as much of the prompt as it has room for", "", "collate", "at = head + max(cut, len(x.tokens) - length, 0)", "at = head + max(len(x.tokens) - length, 0)", "test_collate.py::test_the_ends_that_are_kept_have_one_prompt_and_begin_as_they_did"),
    Mutant("M18", "log-probs of the reference stand where an answer was before it moved", "", "offline", "refs.new_zeros(tokens.shape).masked_scatter(attention, refs)", "refs.new_zeros(tokens.shape).masked_scatter(attention.sort(descending=True).values, refs)", "test_dpo.py::test_the_reference_is_compared_with_itself_as_a_tie_to_the_last_bit"),
    Mutant("M16", "rows that are padded otherwise count as alike", "", "prefix", "torch.where(attention, tokens + 1, 0)[", "tokens[", "test_prefix.py::test_rows_that_differ_in_padding_alone_are_not_shared"),
    Mutant("M16", "no gradient reaches what rows share", "", "models", "self.layers[layer] = keys, values", "self.layers[layer] = keys.detach(), values.detach()", SHARED),
)  # fmt: skip
ELSEWHERE = {}
