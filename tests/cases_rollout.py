"""A tiny Llama to sample from, a decoder with a script, and prompts padded on the left."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_fn import random
from rlhf_fn.decoding import Decoder, decoder
from rlhf_fn.models import causal_lm
from rlhf_fn.rollout import Prompts, sample

VOCAB, PAD, STOP = 13, 0, 2


def llama(**changes):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32,
        "initializer_range": 0.6,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**(sizes | changes))).double().eval()


MODEL = llama()
DECODER, POLICY = decoder(MODEL), causal_lm(MODEL)


def padded(rows, width):
    """Left-padded prompts; the padding holds ids that would matter if they were read."""
    tokens = torch.tensor([[7] * (width - len(row)) + row for row in rows])
    attention = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows])
    return Prompts(tokens, attention)


def draw(prompts, keys, **changes):
    options = {"max_new_tokens": 6, "temperature": 1.0, "stop": [STOP], "pad": PAD} | changes
    return sample(DECODER, POLICY.params, prompts, keys, **options)


def scripted(rows):
    """A decoder that can only say `rows`."""
    table = torch.tensor(rows)

    def logits(step, rows):
        certain = torch.full((len(rows), VOCAB), -torch.inf)
        return certain.scatter(1, table[rows, step, None], 0.0)

    def prefill(params, tokens, attention, length):
        rows = torch.arange(len(tokens))
        return logits(0, rows), (rows, torch.full_like(rows, tokens.shape[1]))

    def decode(params, tokens, attention, index, cache):
        assert attention.shape == (len(cache[0]), index + 1)
        return logits(index + 1 - int(cache[1][0]), cache[0]), cache

    return Decoder(prefill, decode)


PROMPT = padded([[5, 6, 7], [8]], 3)
KEYS = random.split(random.key(1), 2)
