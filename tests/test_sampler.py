"""How commands sample: the blank rollout that goes first fits every size, and changes no answer."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from cases_steps import LM, llama

from rlhf_fn import random, sampler
from rlhf_fn.engine import compiled
from rlhf_fn.rollout import Prompts

HOW = {"temperature": 1.0, "stop": (5,), "pad": 0}


@pytest.mark.parametrize("width, new", [(1, 1), (1, 2), (3, 4)])
def test_compiled_turns_answer_as_eager_ones_from_the_smallest_size_on(
    width, new, monkeypatch, capsys
):
    uncompiled = partial(compiled, compile=lambda function: function)
    monkeypatch.setattr(sampler, "compiled", uncompiled)
    tokens = torch.arange(2 * width).view(2, width) % 5 + 1
    prompts, keys = Prompts(tokens, tokens > 0), random.split(random.key(1), 4)
    answers = []
    for compile in (0, 1):
        options = SimpleNamespace(compile=compile, dtype="float32", batch=2, new_tokens=new)
        draw = sampler.sampler(llama(), options, LM.params, width=width, group=2, **HOW)
        answers.append(draw(LM.params, prompts, keys))
    for one, other in zip(*answers):
        torch.testing.assert_close(one, other)
    assert capsys.readouterr().out.count("sampling: ") == 2
