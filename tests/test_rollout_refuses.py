"""What sampling refuses, by name."""

import pytest
import torch
from cases_rollout import DECODER, KEYS, POLICY, PROMPT, VOCAB, draw

from rlhf_fn import random
from rlhf_fn.rollout import Prompts, sample

WRONG = {
    "temperature": {"temperature": 0.0},
    "temperature must": {"temperature": -1.0},
    "temperature must be": {"temperature": float("nan")},
    "top_k": {"top_k": 0},
    "top_p": {"top_p": 0.0},
    "top_p must": {"top_p": 1.1},
    "max_new_tokens": {"max_new_tokens": 0},
    "stop": {"stop": [VOCAB]},
    "pad": {"pad": -1},
    "takes at most 32": {"max_new_tokens": 31},
}


@pytest.mark.parametrize("said, option", WRONG.items(), ids=WRONG)
def test_a_wrong_option_raises_and_is_named(said, option):
    with pytest.raises(ValueError, match=said):
        draw(PROMPT, KEYS, **option)


def test_wrong_prompts_and_keys_raise():
    right_padded = Prompts(PROMPT.tokens, PROMPT.attention.flip(1))
    empty = Prompts(PROMPT.tokens, PROMPT.attention & torch.tensor([[True], [False]]))
    for prompts in (right_padded, empty):
        with pytest.raises(ValueError, match="row 1"):
            draw(prompts, KEYS)
    for keys in (KEYS[:1], random.split(random.key(0), 3), KEYS[0], KEYS[:0]):
        with pytest.raises((ValueError, TypeError), match="one per answer|Type-check error"):
            draw(PROMPT, keys)
    with pytest.raises(ValueError, match="shapes differ"):
        draw(Prompts(PROMPT.tokens, PROMPT.attention[:, 1:]), KEYS)
    with pytest.raises(TypeError, match="attention"):
        draw(Prompts(PROMPT.tokens, PROMPT.attention.long()), KEYS)
    with pytest.raises(TypeError, match="max_new_tokens must be an int|Type-check error"):
        draw(PROMPT, KEYS, max_new_tokens=2.0)


def test_a_policy_that_diverged_raises_instead_of_sampling():
    params = {name: p * torch.nan for name, p in POLICY.params.items()}
    with pytest.raises(ValueError, match="not finite at new token 0"):
        sample(DECODER, params, PROMPT, KEYS, max_new_tokens=2, temperature=1.0, stop=[], pad=0)
