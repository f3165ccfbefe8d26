"""Llamas with random weights, and batches for them: what every benchmark of a model trains."""

import math
from typing import Any, NamedTuple

import bench
import torch
from bench import Machine


class Shape(NamedTuple):
    """Of a Llama; `tied`: the head is the embedding."""

    vocab: int = 32000
    width: int = 512
    inner: int = 1024
    layers: int = 4
    heads: int = 8
    kv_heads: int = 8
    tied: bool = False

    @property
    def products(self) -> int:
        """Weights that every token is multiplied with: all but the embedding, the head too."""
        kv = self.width * self.kv_heads // self.heads
        layer = 2 * self.width * (self.width + kv) + 3 * self.width * self.inner
        return self.layers * layer + self.vocab * self.width


HALF_BILLION = Shape(151936, 896, 4864, 24, 14, 2, tied=True)  # of Qwen2.5-0.5B


def llama(machine: Machine, shape: Shape, longest: int) -> Any:
    """A module in float32, the same in every process; `longest`: tokens of a row."""
    try:
        import transformers as hf
    except ImportError as error:
        raise bench.Skipped(bench.said(error)) from error
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=shape.vocab, hidden_size=shape.width, intermediate_size=shape.inner,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, max_position_embeddings=longest,
        tie_word_embeddings=shape.tied,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config).to(machine.device).eval()


def policy_batch(machine: Machine, vocab: int, rows: int, time: int) -> Any:
    """The same `PolicyBatch` every time; the last eighth of every other row is padding."""
    from rlhf_fn.losses import PolicyBatch

    device, shape = machine.device, (rows, time)
    drawn = {"device": device, "generator": torch.Generator(device).manual_seed(0)}
    short = torch.arange(rows, device=device)[:, None] % 2 * (time // 8)
    real = torch.arange(time, device=device) < time - short
    level = torch.full(shape, -math.log(vocab), device=device)
    return PolicyBatch(
        torch.randint(vocab, shape, **drawn), real, level, level - 0.1,
        torch.randn(shape, **drawn), real / real.sum(),
    )  # fmt: skip
