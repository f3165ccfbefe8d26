"""What both sides of benchmark_trl.py train: the same Llama, the same tokens, the same lengths."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

LR, BETAS, EPS, MAX_NORM = 1e-5, (0.9, 0.999), 1e-8, 1.0  # of AdamW, without decay, constant
PROMPT, ANSWER = 32, 64  # tokens
SFT_ROWS, SFT_LENGTH, PAIRS, PROMPTS, GROUP, ROLLOUTS = 8, 128, 8, 4, 8, 32
BETA, KL = 0.1, 0.05  # of DPO, and of PPO's penalty
PAD, EOS, UNK = 0, 1, 2
STEPS = 400  # of data; nobody waits for that many


class Job(NamedTuple):
    """What a process is asked to time."""

    name: str  # sft | dpo | reward | grpo | ppo
    vocab: int
    dtype: str  # float32 | bfloat16, of the products of matrices; weights are float32


def llama(kind: str, vocab: int) -> Any:
    """A Llama with random weights; without its embeddings it has 3.2 million."""
    import transformers as hf

    torch.manual_seed({"policy": 0, "reward": 1, "value": 2}[kind])
    config = hf.LlamaConfig(
        vocab_size=vocab, hidden_size=256, intermediate_size=688, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=256,
        pad_token_id=PAD, eos_token_id=EOS, bos_token_id=None, num_labels=1,
    )  # fmt: skip
    both = hf.LlamaForCausalLM, hf.LlamaForSequenceClassification
    return both[kind != "policy"](config).eval()


def rows(number: int, length: int, vocab: int, seed: int) -> list[list[int]]:
    """Token ids, none of them special."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocab, (number, length), generator=draw).tolist()


def pairs(vocab: int) -> tuple[list, list, list]:
    """(prompts, chosen, rejected); an answer ends."""
    number = PAIRS * STEPS
    answers = (rows(number, ANSWER - 1, vocab, seed) for seed in (1, 2))
    chosen, rejected = ([row + [EOS] for row in side] for side in answers)
    return rows(number, PROMPT, vocab, 0), chosen, rejected


def prompts(number: int, vocab: int) -> list[list[int]]:
    return rows(number * STEPS, PROMPT, vocab, 0)


def worth(ids: list[int]) -> float:
    """The reward of an answer: the share of its tokens that are even."""
    return sum(token % 2 == 0 for token in ids) / max(len(ids), 1)


class Lap:
    """A process's side of the race: it waits to be asked, steps, and says how long that took."""

    def __init__(self) -> None:
        self.began = time.perf_counter()

    def start(self) -> None:
        """Wait for the next turn; the process ends where there is none."""
        if not sys.stdin.readline():
            sys.exit()
        self.began = time.perf_counter()

    def end(self, loss: float) -> None:
        seconds = time.perf_counter() - self.began
        status = Path("/proc/self/status").read_text()
        peak = next(int(x.split()[1]) for x in status.splitlines() if x.startswith("VmHWM"))
        said = {"seconds": seconds, "loss": loss, "peak": peak * 1024}
        sys.__stdout__.write("LAP " + json.dumps(said) + "\n")  # whatever else a library prints
        sys.__stdout__.flush()

    def run(self, step: Callable[[], float]) -> None:
        """Step for as long as somebody asks."""
        while True:
            self.start()
            self.end(step())
