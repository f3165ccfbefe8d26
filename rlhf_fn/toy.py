"""The embedded default: a small grammar whose true preference is known, so a run can be judged.

Every text answers "about the fox near the barn :" in three clauses. People (the true preference)
like kind words, each once, and dislike rude ones and answers about something else.
"""

import math
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf_fn import random

ANIMALS = tuple(
    "fox bear owl hare wolf crow mole deer goat seal lynx toad "
    "duck frog hen swan pony lamb robin otter mouse goose badger beaver".split()
)
KIND = tuple("kind gentle brave warm patient honest loyal cheerful".split())
PLAIN = tuple("tall old quick quiet brown small young slow".split())
RUDE = tuple("mean cruel rude lazy greedy angry selfish nasty".split())
VERBS = tuple("runs walks sits hides sleeps plays".split())
PLACES = tuple("river forest garden hill barn field lake road cave beach tree bridge".split())
GLUE = tuple("about the : is and . it near".split())
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")


class Pair(NamedTuple):
    prompt: str
    chosen: str
    rejected: str


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word; pad, bos, eos and unk are tokens of their own."""
    words = (*SPECIAL, *GLUE, *ANIMALS, *KIND, *PLAIN, *RUDE, *VERBS, *PLACES)
    model = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    core = Tokenizer(model)
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL))
    return PreTrainedTokenizerFast(tokenizer_object=core, padding_side="left", **names)


def model(vocab: int, seed: int) -> LlamaForCausalLM:
    """A Llama of about a million parameters with fresh weights drawn from `seed`."""
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=144, intermediate_size=384, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def _choose(words: tuple[str, ...], draw: float) -> str:
    return words[int(draw * len(words))]


def prompts() -> list[str]:
    """All 288 prompts of the grammar."""
    return [f"about the {animal} near the {place} :" for animal in ANIMALS for place in PLACES]


def answer(prompt: str, key: Tensor) -> str:
    """the fox is kind and old . it runs near the barn . it is mean .

    Each adjective is kind, plain or rude with equal odds; one answer in ten mistakes the animal,
    and each clause is left out one time in five, so that preferences speak of short answers too.
    """
    u = random.uniform(key, (12,)).tolist()
    _, _, animal, _, _, place, _ = prompt.split()
    animal = animal if u[0] > 0.1 else _choose(ANIMALS, u[1])
    first, second, third = (
        _choose((KIND, PLAIN, RUDE)[int(3 * u[i])], u[i + 1]) for i in (2, 4, 6)
    )
    clauses = (
        f"the {animal} is {first} and {second} .",
        f"it {_choose(VERBS, u[8])} near the {place} .",
        f"it is {third} .",
    )
    said = [clause for clause, draw in zip(clauses, u[9:]) if draw > 0.2]
    return " ".join(said or clauses)


def true_preference(prompt: str, answer: str) -> float:
    """Distinct kind words − distinct rude words − 2 for each of animal and place not named."""
    words = set(answer.split())
    _, _, animal, _, _, place, _ = prompt.split()
    wrong = (animal not in words) + (place not in words)
    return len(words & set(KIND)) - len(words & set(RUDE)) - 2.0 * wrong


def demonstrations(asked: list[str], key: Tensor) -> list[tuple[str, str]]:
    """(prompt, answer) for each prompt asked: answers of the grammar, of every quality."""
    return [(x, answer(x, k)) for x, k in zip(asked, random.split(key, len(asked)))]


def preferences(asked: list[str], key: Tensor) -> list[Pair]:
    """Two answers to each prompt, labelled by a Bradley–Terry judge of the true preference."""
    left, right, coin = random.split(key, 3)
    coins = random.uniform(coin, (len(asked),)).tolist()
    pairs = []
    for (x, first), (_, second), u in zip(
        demonstrations(asked, left), demonstrations(asked, right), coins
    ):
        margin = true_preference(x, first) - true_preference(x, second)
        if first == second:
            continue
        wins = u < 1 / (1 + math.exp(-margin))
        pairs.append(Pair(x, *((first, second) if wins else (second, first))))
    return pairs
