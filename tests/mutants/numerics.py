"""Bugs of log-probs, entropies, divergences and kernels."""
# ruff: noqa: E501

from mutants.plant import Mutant

HALF = "torch.promote_types(logits.dtype, torch.float32)"
MUTANTS = (
    Mutant("L01", "the temperature is left out of the log-probs that are trained", "TRL 3029, OpenRLHF 857, verl 3133, NeMo-RL 316", "logprobs", "logprobs = _tempered(logits, temperature).log_softmax(-1)\n    return", "logprobs = _tempered(logits, 1.0).log_softmax(-1)\n    return", "test_logprobs.py::test_training_and_sampling_at_a_temperature_speak_of_one_distribution"),
    Mutant("L01", "the temperature is left out of the sampler", "TRL 3029", "rollout", "keepdim=True)) / temperature", "keepdim=True)) / 1.0", "test_rollout.py::test_logprobs_are_those_of_a_full_forward"),
    Mutant("L01", "the temperature is left out of the entropy", "verl 3133", "logprobs", "logprobs = _tempered(logits, temperature).log_softmax(-1)\n    probs", "logprobs = _tempered(logits, 1.0).log_softmax(-1)\n    probs", "test_logprobs.py::test_entropy_is_that_of_a_loop_and_lies_between_nought_and_that_of_a_fair_die"),
    Mutant("L03", "the sampler normalises over top-p, its log-probs over everything", "TRL 6789, vllm 42259", "rollout", "token_logprobs(z, drawn), 0.0)", "token_logprobs(logits, drawn, temperature=temperature), 0.0)", "test_rollout.py::test_logprobs_are_those_of_a_full_forward"),
    Mutant("L04", "the logits are tempered in place, in the sampler", "OpenRLHF 857", "rollout", "logits = (logits - logits.amax(-1, keepdim=True)) / temperature", "logits = logits.sub_(logits.amax(-1, keepdim=True)).div_(temperature)", "test_rollout.py::test_sampling_logits_never_write_to_the_logits"),
    Mutant("L04", "the logits are tempered in place, in the loss", "verl 3133, NeMo-RL 316", "logprobs", "return logits if temperature == 1 else logits / temperature", "return logits.detach().div_(temperature)", "test_contract.py::test_it_writes_to_none_of_its_arguments"),
    Mutant("L05", "the log-softmax is taken in half precision", "OpenRLHF 634, NeMo-RL 26", "logprobs", "logprobs = _tempered(logits, temperature).log_softmax(-1)\n    return", f"logprobs = _tempered(logits, temperature).to(logits.dtype).log_softmax(-1).to({HALF})\n    return", "test_logprobs.py::test_half_precision_is_computed_in_float32_and_returned_so"),
    Mutant("L05", "the KL estimate is taken in half precision", "OpenRLHF 620", "kl", "return _wide(logprobs) - _wide(ref_logprobs)", "return _wide(logprobs - ref_logprobs)", "test_kl.py::test_half_precision_is_computed_in_float32_and_returned_so"),
    Mutant("L06", "the logits of a position are paired with the token they have read", "prime-rl 1525", "models", "before = rows[..., :-1, :]", "before = rows[..., 1:, :]", "test_models.py::test_the_shift_pairs_every_token_with_the_logits_before_it"),
    Mutant("L06", "the value of a token is read after it", "prime-rl 1525", "heads", "return F.pad(x[..., :-1], (1, 0))", "return x", "test_heads.py::test_the_value_of_a_token_is_read_before_it"),
    Mutant("L08", "the labels are shifted twice", "open-instruct 1549, TRL 4038", "models", "tokens[..., 1:], **hyperparameters", "tokens[..., 1:].roll(-1, -1), **hyperparameters", "test_models.py::test_the_shift_pairs_every_token_with_the_logits_before_it"),
    Mutant("L08", "what is shifted is masked as if it were not", "TRL 5620", "models", "F.pad(x, (1, 0)), out)", "F.pad(x, (0, 1)), out)", "test_models.py::test_the_shift_pairs_every_token_with_the_logits_before_it"),
    Mutant("L09", "the entropy beside a banned token is 0 · ∞", "TRL 7221, SkyRL 2259", "logprobs", "-(probs * torch.where(probs > 0, logprobs, 0.0)).sum(-1)", "-(probs * logprobs).sum(-1)", "test_logprobs.py::test_a_banned_token_is_as_if_cut_out_of_the_vocabulary_forward_and_backward"),
    Mutant("L09", "the entropy is patched after the product: its gradient is NaN", "TRL 7252, optax 1762", "logprobs", "-(probs * torch.where(probs > 0, logprobs, 0.0)).sum(-1)", "-(probs * logprobs).nan_to_num(0.0).sum(-1)", "test_logprobs.py::test_a_banned_token_is_as_if_cut_out_of_the_vocabulary_forward_and_backward"),
    Mutant("L09", "the same without logits", "TRL 7221", "linear", "return -p * torch.where(p > 0, logp + entropy, 0.0)", "return -p * (logp + entropy)", "test_linear_entropy.py::test_a_banned_token_has_no_part_in_the_entropy_and_gets_no_gradient"),
    Mutant("L11", "every gradient is multiplied by that of the first token", "Liger 1298", "linear", "mass = logp.exp() * grad\n", "mass = logp.exp() * grad[0]\n", "test_linear_logprobs.py::test_it_is_token_logprobs_whatever_the_chunk_with_the_same_gradients"),
    Mutant("L16", "the weights of the mixture are swapped", "TRL 3043", "distillation", "share * full_kl(teacher, mixture) + (1 - share) * full_kl(student, mixture)", "(1 - share) * full_kl(teacher, mixture) + share * full_kl(student, mixture)", "test_distillation.py::test_generalised_jsd_is_its_loop_symmetric_and_bounded test_distillation.py::test_generalised_jsd_runs_into_the_forward_and_the_reverse_kl"),
    Mutant("L16", "a mixture at its ends takes log 0", "TRL 3043, Liger 862", "distillation", "    checks.positive(beta=beta)\n    checks.below_one(beta=beta)\n", "", "test_distillation.py::test_settings_of_distillation_and_critics_that_cannot_mean_anything_are_refused"),
    Mutant("L16", "a banned token makes −∞ − (−∞) of the mixture", "Liger 862", "distillation", "x.clamp(min=lowest) for x in parts", "x for x in parts", "test_distillation.py::test_generalised_jsd_of_banned_tokens_is_finite_forward_and_backward"),
    Mutant("L17", "the odds of a confident answer are NaN", "TRL 1491, 2274, 2564, axolotl 3910", "reference_free", "return logprobs - log1mexp(logprobs.clamp(max=-torch.finfo(logprobs.dtype).tiny))", "return logprobs - torch.log(1 - logprobs.exp())", "test_answers.py::test_orpo_and_its_gradient_are_finite_at_any_confidence"),
    Mutant("L17", "a fudge keeps the odds finite and every value wrong", "ColossalAI 6407", "reference_free", "return logprobs - log1mexp(logprobs.clamp(max=-torch.finfo(logprobs.dtype).tiny))", "return logprobs - torch.log(1.0001 - logprobs.exp())", "test_answers.py::test_orpo_is_its_loop test_answers.py::test_log_odds_are_the_inverse_of_log_sigmoid"),
    Mutant("L17", "log(1 − eˣ) loses its digits near 0", "TRL 1491", "kl", "return torch.where(near, close, torch.log1p(-torch.where(near, -1.0, x).exp()))", "return torch.log1p(-x.exp())", "test_selection.py::test_log1mexp_keeps_its_digits"),
    Mutant("L20", "without logits the weight has the gradient of another scale", "axolotl 2483", "linear", "d_weight.append((mass @ hidden).to(weight.dtype))", "d_weight.append((0.7 * mass @ hidden).to(weight.dtype))", "test_linear_logprobs.py::test_it_is_token_logprobs_whatever_the_chunk_with_the_same_gradients"),
    Mutant("L22", "compiled, a function is another one", "torchtune 2765", "kl", "return k1(logprobs, ref_logprobs).square() / 2", "return k1(logprobs, ref_logprobs).square() / (1 if torch.compiler.is_compiling() else 2)", "test_contract.py::test_it_compiles_to_one_graph_equal_to_eager[k2]"),
)  # fmt: skip
ELSEWHERE = {
    "L13": "of logits in bf16 only kernels make one: test_kernels_mutants.py, '1 − π is taken from a rounded π'",
    "L14": "no place on a CPU: 2³¹ logits are 4 GB, and offsets are 64-bit in every kernel",
    "L23": "this replay: a test that cannot fail would let its bug pass",
}
