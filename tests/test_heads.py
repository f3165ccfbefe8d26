import json

import pytest
import tiny
import torch
import transformers as hf
from hypothesis import given, settings
from torch.func import grad, vmap

from rlhf_fn import random
from rlhf_fn.heads import (
    actor_critic,
    classifier,
    first_token,
    last_token,
    load_reward_model,
    mean_pool,
    policy_params,
    reward_model,
    save_reward_model,
    token_reward,
    value_model,
)
from rlhf_fn.models import causal_lm, hidden_states, save_policy

few = settings(max_examples=12)
each_decoder = pytest.mark.parametrize("family", tiny.DECODERS)
each_family = pytest.mark.parametrize("family", [*tiny.DECODERS, *tiny.ENCODERS])
close = torch.testing.assert_close
KEY = random.key(0)


def right_padded():
    tokens = torch.tensor([[3, 4, 5, 6, 0], [7, 8, 9, 0, 0], [3, 12, 11, 10, 4]])
    return tokens, tokens != 0


@each_decoder
@given(rows=tiny.ragged(least=2))
@few
def test_the_value_of_a_token_is_read_before_it(family, rows):
    tokens, attention = rows
    module = tiny.tiny(family)
    apply, params = value_model(module, KEY)
    states, backbone = hidden_states(module)
    values = apply(params, tokens, attention)
    for row, kept, value in zip(tokens, attention, values):
        alone = row[kept]
        for t in range(1, len(alone)):
            before = states(backbone, alone[:t], tiny.whole(alone[:t]))[-1]
            close(value[kept][t], before @ params["head.weight"][0])
    assert values[:, 0].eq(0).all() and values.isfinite().all()


@each_decoder
@given(rows=tiny.ragged())
@few
def test_a_token_reward_has_read_its_token(family, rows):
    tokens, attention = rows
    apply, params = token_reward(tiny.tiny(family), KEY)
    scores = apply(params, tokens, attention)
    row_score, _ = reward_model(tiny.tiny(family), KEY)
    close(last_token(scores[..., None], attention)[..., 0], row_score(params, tokens, attention))
    assert scores.shape == tokens.shape
    values, _ = value_model(tiny.tiny(family), KEY)
    close(values(params, tokens, attention)[:, 1:], scores[:, :-1])


@pytest.mark.parametrize("pool", [last_token, first_token, mean_pool])
@each_family
@given(rows=tiny.ragged())
@few
def test_the_reward_of_a_row_does_not_depend_on_padding(family, pool, rows):
    tokens, attention = rows
    apply, params = reward_model(tiny.tiny(family), KEY, pool=pool)
    scores = apply(params, tokens, attention)
    close(scores, apply(params, tiny.garbage(tokens, attention), attention), rtol=0, atol=0)
    alone = [apply(params, r[kept], tiny.whole(r[kept])) for r, kept in zip(tokens, attention)]
    close(scores, torch.stack(alone))


@given(rows=tiny.ragged())
@few
def test_pools_read_the_tokens_of_their_row_and_nothing_else(rows):
    _, attention = rows
    hidden = torch.randn(*attention.shape, 5, dtype=torch.float64)
    hidden[~attention] = torch.nan
    for i, kept in enumerate(attention):
        row = hidden[i][kept]
        close(last_token(hidden, attention)[i], row[-1])
        close(first_token(hidden, attention)[i], row[0])
        close(mean_pool(hidden, attention)[i], row.mean(0))


@each_decoder
@given(rows=tiny.ragged())
@few
def test_an_actor_critic_is_the_policy_and_the_value_model_in_one(family, rows):
    module = tiny.tiny(family)
    apply, params = actor_critic(module, KEY)
    both = apply(params, *rows)
    logits = causal_lm(module).apply(policy_params(params), *rows)
    values = value_model(module, KEY)
    close(both.logits, logits)
    close(both.values, values.apply(values.params, *rows))


@each_decoder
def test_the_value_head_of_an_actor_critic_trains_the_backbone_it_shares(family):
    tokens, attention = right_padded()
    apply, params = actor_critic(tiny.tiny(family), KEY)
    slope = grad(lambda p, *rows: apply(p, *rows).values.square().sum())
    slopes = slope(params, tokens, attention)
    assert all(x.isfinite().all() for x in slopes.values())
    moved = [name for name, x in slopes.items() if x.any() and name != "value_head.weight"]
    assert len(moved) > len(slopes) / 2
    each = vmap(slope, in_dims=(None, 0, 0))(params, tokens, attention)
    close({name: x.sum(0) for name, x in each.items()}, slopes)


def test_a_head_is_a_function_of_its_key():
    one, same, other = (
        reward_model(tiny.tiny("llama"), random.key(seed)).params for seed in (0, 0, 1)
    )
    close(one, same, rtol=0, atol=0)
    assert not one["head.weight"].equal(other["head.weight"])
    wide = hf.LlamaConfig(**tiny.WIDE | {"hidden_size": 2048, "num_hidden_layers": 1})
    head = reward_model(hf.LlamaForCausalLM(wide), KEY).params["head.weight"]
    assert head.shape == (1, 2048) and abs(head.std() * 2049**0.5 - 1) < 0.1


@each_decoder
def test_a_critic_starts_from_a_reward_model_by_taking_its_params(family):
    tokens, attention = right_padded()
    reward = reward_model(tiny.tiny(family), random.key(7))
    values = value_model(tiny.tiny(family), KEY).apply(reward.params, tokens, attention)
    score = reward.apply(reward.params, tokens[2, :-1], attention[2, :-1])
    close(values[2, -1], score)


@each_decoder
def test_a_saved_reward_model_gives_the_same_scores_to_everybody(family, tmp_path):
    tokens, attention = right_padded()
    module = tiny.tiny(family)
    apply, params = reward_model(module, random.key(7))
    scores = apply(params, tokens, attention)
    save_reward_model(module, params, tmp_path)
    theirs = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float64)
    close(theirs.eval()(tokens, attention_mask=attention.long()).logits[:, 0], scores)
    again, loaded = classifier(load_reward_model(tmp_path).double())
    assert loaded.keys() == params.keys()
    close(again(loaded, tokens, attention), scores, rtol=1e-4, atol=1e-5)
    assert json.loads((tmp_path / "config.json").read_text())["pad_token_id"] == 0
    assert module.config.num_labels == 2  # the module's own config is not written to


def bert_classifier(labels=1):
    config = hf.BertConfig(**tiny.WIDE, **tiny.BERT_DROPS, num_labels=labels)
    return tiny.seeded(lambda: hf.BertForSequenceClassification(config))


def test_an_encoder_that_classifies_is_a_reward_model_to_us_and_to_everybody(tmp_path):
    tokens, attention = right_padded()
    module = bert_classifier()
    apply, params = classifier(module)
    scores = apply(params, tokens, attention)
    close(scores, module.eval()(tokens, attention_mask=attention).logits[:, 0])
    left = [tokens.roll(1, -1), attention.roll(1, -1)]
    close(apply(params, *(x[:2] for x in left)), scores[:2])
    save_reward_model(module, params, tmp_path)
    again, loaded = classifier(load_reward_model(tmp_path).double())
    close(again(loaded, tokens, attention), scores, rtol=1e-4, atol=1e-5)


def test_what_is_not_a_reward_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="num_labels = 3"):
        classifier(bert_classifier(labels=3))
    with pytest.raises(TypeError, match="decoder"):
        value_model(tiny.tiny("bert"), KEY)
    with pytest.raises(TypeError, match="causal"):
        actor_critic(tiny.tiny("bert"), KEY)
    encoder = reward_model(tiny.tiny("bert"), KEY)
    with pytest.raises(TypeError, match="decoder"):
        save_reward_model(tiny.tiny("bert"), encoder.params, tmp_path)
    module = tiny.fresh("llama")
    save_policy(module, causal_lm(module).params, tmp_path)
    with pytest.raises(ValueError, match="score.weight"):
        load_reward_model(tmp_path)
    module.config.pad_token_id = None
    with pytest.raises(ValueError, match="pad_token_id"):
        save_reward_model(module, reward_model(module, KEY).params, tmp_path)


@pytest.mark.compile
def test_a_compiled_actor_critic_is_one_graph_and_the_same():
    apply, params = actor_critic(tiny.tiny("llama"), KEY)
    slope = grad(lambda p, *rows: sum(x.square().sum() for x in apply(p, *rows)))
    torch._dynamo.reset()
    compiled = torch.compile(slope, fullgraph=True, backend="aot_eager")
    close(compiled(params, *right_padded()), slope(params, *right_padded()))
