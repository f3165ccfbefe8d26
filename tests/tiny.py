"""Tiny models of every family, in float64, and ragged batches for them."""

import functools

import torch
import transformers as hf
from hypothesis import strategies as st
from torch import nn

from rlhf_fn import toy

VOCAB, LONGEST = 13, 24
IDS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
COMMON = IDS | SIZE | {"max_position_embeddings": LONGEST}
WIDE = COMMON | {"intermediate_size": 24}
GROUPED = WIDE | {"num_key_value_heads": 2, "attention_dropout": 0.5}
DROPS = {"hidden_dropout": 0.5, "attention_dropout": 0.5}
BERT_DROPS = {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}

DECODERS = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**GROUPED, tie_word_embeddings=True)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**GROUPED, head_dim=8)),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(**IDS, n_embd=16, n_layer=2, n_head=4, n_positions=LONGEST, attn_pdrop=0.5)
    ),
    "neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**WIDE, **DROPS)),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(**COMMON, ffn_dim=24, word_embed_proj_dim=16, dropout=0.5, layerdrop=0.5)
    ),
}
ENCODERS = {
    "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**WIDE, **BERT_DROPS)),
    "roberta": lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**WIDE, **BERT_DROPS)),
}


def seeded(make, seed: int = 0) -> hf.PreTrainedModel:
    """A model of its own, in training mode, every weight drawn from N(0, 0.3²)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = make()
        for p in module.parameters():
            nn.init.normal_(p, std=0.3)
    return module.double().train()


def fresh(family: str, seed: int = 0) -> hf.PreTrainedModel:
    return seeded((DECODERS | ENCODERS)[family], seed)


tiny = functools.cache(fresh)  # never written to: that is one of the laws


@st.composite
def ragged(draw, rows=3, longest=6, padding=4, least=1):
    """Rows of tokens without padding, and the same rows in one batch padded on both sides."""
    seed = draw(st.integers(0, 2**31))
    lengths = draw(st.lists(st.integers(least, longest), min_size=rows, max_size=rows))
    width = max(lengths) + draw(st.integers(0, padding))
    starts = [draw(st.integers(0, width - n)) for n in lengths]
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCAB, (rows, width), generator=generator)
    step = torch.arange(width)
    spans = zip(starts, lengths)
    attention = torch.stack([(step >= s) & (step < s + n) for s, n in spans])
    return tokens, attention


def garbage(tokens, attention, seed=1):
    """The same tokens with other ids in the padding."""
    other = torch.randint(0, VOCAB, tokens.shape, generator=torch.Generator().manual_seed(seed))
    return torch.where(attention, tokens, other)


def whole(tokens):
    return torch.ones_like(tokens, dtype=torch.bool)


def save_toy(folder, tokenizer=None, **changes):
    """A Llama of a few thousand weights with the toy grammar's tokenizer, as a folder."""
    tokenizer = toy.tokenizer() if tokenizer is None else tokenizer
    sizes = SIZE | {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    options = IDS | sizes | {"vocab_size": len(toy.tokenizer()), "max_position_embeddings": 64}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf.LlamaForCausalLM(hf.LlamaConfig(**options | changes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
