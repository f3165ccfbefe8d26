"""Answers of an OpenAI-compatible completions server, and what they weigh for the trainer.

    vllm serve MODEL --logprobs-mode processed_logprobs   # or any server of such answers
    python examples/external_engine.py --url http://localhost:8000/v1 --name MODEL \\
        --model MODEL --prompts PROMPTS.txt

Asks for a group of answers to each prompt, with token ids and log-probs, reads the same tokens with
the trainer's own model, and prints how far the two are apart. `completed` and `rollout_of` together
take the place of `sample`; the weights of `importance` multiply those of a batch.

A server must return ids and log-probs of the tokens it sampled, the stop included, and log-probs
after the temperature. One that returns text alone is refused: text does not tell its tokens.
"""

import argparse
import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from rlhf_fn import data, readers
from rlhf_fn.collate import prompt_batch
from rlhf_fn.external import importance, rollout_of
from rlhf_fn.loading import load_policy
from rlhf_fn.losses import next_token_logprobs
from rlhf_fn.mismatch import truncated_weights
from rlhf_fn.models import causal_lm

Answer = tuple[list[int], list[float]]  # ids, and log-probs of these


def completed(
    url: str, name: str, prompts: Sequence[Sequence[int]], *, group: int, stop: Sequence[int],
    max_new_tokens: int, temperature: float, seed: int,
) -> tuple[list[list[int]], list[list[float]]]:  # fmt: skip
    """Ids and log-probs of `group` answers to every prompt, those of a prompt one after the other.

    Raises:
        ValueError: the server refuses, or returns other numbers of answers, no ids or no log-probs.
        OSError: it cannot be reached.
    """
    answers: list[Answer] = []
    for i, prompt in enumerate(prompts):
        asked = {
            "model": name, "prompt": list(prompt), "n": group, "max_tokens": max_new_tokens,
            "temperature": temperature, "top_p": 1.0, "seed": seed + i, "logprobs": 1,
            "stop_token_ids": list(stop), "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }  # fmt: skip
        choices = sorted(_posted(f"{url}/completions", asked)["choices"], key=_index)
        if len(choices) != group:
            raise ValueError(f"prompt {i}: the server gave {len(choices)} answers, not {group}")
        answers += map(_answer, choices)
    ids, logprobs = zip(*answers)
    return list(ids), list(logprobs)


def _posted(url: str, body: dict[str, Any]) -> dict[str, Any]:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=600) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        said = error.read().decode(errors="replace")[:500]
        raise ValueError(f"{url} refuses with status {error.code}: {said}") from error


def _index(choice: dict[str, Any]) -> int:
    return choice.get("index", 0)


def _answer(choice: dict[str, Any]) -> Answer:
    """Ids from `token_ids`, or from tokens that are written "token_id:5"."""
    logprobs = choice.get("logprobs") or {}
    ids = choice.get("token_ids") or list(_written(logprobs.get("tokens") or []))
    if not ids or logprobs.get("token_logprobs") is None:
        raise ValueError(
            "the server returns text without token ids or without log-probs; it must honour "
            "logprobs, and return_token_ids or return_tokens_as_token_ids"
        )
    return ids, logprobs["token_logprobs"]


def _written(tokens: Sequence[str]) -> Iterator[int]:
    for token in tokens:
        if not token.startswith("token_id:"):
            raise ValueError(f"the server writes {token!r} for a token, expected token_id:NUMBER")
        yield int(token.removeprefix("token_id:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://localhost:8000/v1")
    parser.add_argument("--name", required=True, help="of the model, at the server")
    parser.add_argument("--model", required=True, help="the same model, for the trainer")
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--number", type=int, default=8)
    parser.add_argument("--group", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--clip", type=float, default=2.0, help="of the importance weights")
    options = parser.parse_args()

    policy = load_policy(options.model)
    texts = readers.read_prompts(options.prompts).records[: options.number]
    rows = [list(data.encode_prompt(policy.encoder, text))[:64] for text in texts]
    stop, pad = policy.stop, policy.encoder.pad
    answers, logprobs = completed(
        options.url, options.name, rows, group=options.group, stop=stop, seed=0,
        max_new_tokens=options.new_tokens, temperature=options.temperature,
    )  # fmt: skip
    rollout = rollout_of(
        prompt_batch(rows, pad), answers, logprobs, max_new_tokens=options.new_tokens,
        vocab=policy.module.config.vocab_size, stop=stop, pad=pad,
    )  # fmt: skip
    apply, params = causal_lm(policy.module)
    ours = next_token_logprobs(apply, temperature=options.temperature)(
        params, rollout.tokens, rollout.attention
    )
    clip = partial(truncated_weights, clip=options.clip)
    _, metrics = importance(ours.detach(), rollout, correction=clip)
    print(f"{len(answers)} answers of {int(rollout.mask.sum())} tokens")
    for name, x in metrics.items():
        print(f"{name:20} {float(x):.6g}")


if __name__ == "__main__":
    main()
