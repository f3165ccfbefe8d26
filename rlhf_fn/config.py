"""The options of each command: a dataclass whose fields are its flags and its config.json."""

import math
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any

SMALLER = (
    "the batch does not fit: lower --batch or raise --accumulate, shorten the rows, or use "
    "--recompute 1, --dtype bfloat16 or --kernels rlhf_kernels, in a new --out"
)


class ConfigError(ValueError):
    """An option that cannot mean what was asked; raised before any work."""


def option(help: str, default: Any = MISSING) -> Any:
    """A field with a line of help; required where it has no default."""
    return field(default=default, metadata={"help": help})


DTYPE = "to compute in: float32 | bfloat16; what is trained stays float32"
KERNELS = "module of linear_token_logprobs, ...: rlhf_kernels; then there are no logits"
DEVICE = "cpu | cuda | cuda:1 ...; by default the GPU, where there is one"
RECOMPUTE = "1: compute activations again backward: less memory, more time"
SHARDS = "ranks that share one copy of the policy, its gradients and its moments"
LAYERWISE = "1: with --shards and --recompute 1, sample a layer at a time, too; slow"
WINDOW = "sort the rows of so many steps by length among them: less padding; 1: do not"
COMPILE = "1: compile the loss, for long runs; its first step takes a minute"


@dataclass(frozen=True)
class Sft:
    model: str = option("causal LM to tune: a folder or a hub id")
    data: tuple[str, ...] = option("instructions, JSON or JSONL (.gz), Alpaca fields")
    out: str = option("folder of the run")
    steps: int = option("optimizer steps", 300)
    batch: int = option("rows per step", 16)
    window: int = option(WINDOW, 1)
    accumulate: int = option("micro-batches per step", 1)
    device: str = option(DEVICE, "")
    dtype: str = option(DTYPE, "float32")
    compile: int = option(COMPILE, 0)
    recompute: int = option(RECOMPUTE, 0)
    shards: int = option(SHARDS, 1)
    kernels: str = option(KERNELS, "")
    lr: float = option("peak learning rate", 5e-4)
    warmup: int = option("steps of linear warm-up; cosine to 0 after it", 20)
    max_length: int = option("tokens per row; longer rows are cut", 256)
    max_norm: float = option("clip the gradient's norm to this", 1.0)
    weight_decay: float = option("AdamW's decoupled weight decay", 0.0)
    held_out: float = option("share of the rows kept for evaluation", 0.1)
    every: int = option("steps between checkpoints", 50)
    seed: int = option("everything random follows from it", 0)


@dataclass(frozen=True)
class Reward:
    model: str = option("backbone: a causal LM or encoder, folder or hub id")
    data: tuple[str, ...] = option("pairs, JSON or JSONL (.gz), or a .pos and a .neg file")
    out: str = option("folder of the run")
    pool: str = option("score the last token or the mean: last | mean", "last")
    part: str = option("use the i-th of n parts of the data: i/n", "1/1")
    steps: int = option("optimizer steps at most", 1000)
    batch: int = option("pairs per step", 16)
    window: int = option(WINDOW, 1)
    accumulate: int = option("micro-batches per step", 1)
    device: str = option(DEVICE, "")
    dtype: str = option(DTYPE, "float32")
    compile: int = option(COMPILE, 0)
    recompute: int = option(RECOMPUTE, 0)
    shards: int = option(SHARDS, 1)
    lr: float = option("peak learning rate", 5e-4)
    warmup: int = option("steps of linear warm-up; cosine to 0 after it", 20)
    max_length: int = option("tokens per text; the end is kept", 256)
    max_norm: float = option("clip the gradient's norm to this", 1.0)
    weight_decay: float = option("AdamW's decoupled weight decay", 0.01)
    held_out: float = option("share of the pairs kept for evaluation", 0.1)
    patience: int = option("evaluations without progress before the run ends", 4)
    every: int = option("steps between evaluations and checkpoints", 50)
    seed: int = option("everything random follows from it", 0)


@dataclass(frozen=True)
class Ppo:
    model: str = option("policy to tune, and its own reference: folder or hub id")
    reward: str = option("reward model: folder of `rlhf-fn reward`")
    prompts: tuple[str, ...] = option("prompts: JSONL, or text (.txt) in lines or documents")
    out: str = option("folder of the run")
    safety: str = option("second reward model: folder", "")
    safety_weight: float = option("weight of the second reward", 1.0)
    steps: int = option("rollouts", 100)
    batch: int = option("prompts per rollout", 64)
    prompt_tokens: int = option("tokens of a prompt; longer ones are cut", 16)
    new_tokens: int = option("tokens sampled per prompt at most", 32)
    temperature: float = option("of sampling and of every log-prob", 1.0)
    epochs: int = option("passes over a rollout", 2)
    minibatches: int = option("optimizer steps per pass", 2)
    accumulate: int = option("micro-batches per optimizer step", 1)
    device: str = option(DEVICE, "")
    dtype: str = option(DTYPE, "float32")
    compile: int = option(COMPILE, 0)
    recompute: int = option(RECOMPUTE, 0)
    shards: int = option(SHARDS, 1)
    layerwise: int = option(LAYERWISE, 0)
    kernels: str = option(KERNELS, "")
    lr: float = option("peak learning rate of the actor", 3e-4)
    critic_lr: float = option("peak learning rate of the critic", 1e-3)
    warmup: int = option("optimizer steps of linear warm-up; linear to 0 after it", 4)
    clip: float = option("of the ratio (and of the value, absolutely)", 0.2)
    discount: float = option("γ", 1.0)
    lam: float = option("λ of GAE", 0.95)
    kl_coef: float = option("β, the KL penalty inside the reward", 0.05)
    target_kl: float = option("adapt β to this KL per sequence, nats; 0 keeps β", 0.0)
    max_kl: float = option("end the epochs early past this KL(old ‖ new) per token", 0.1)
    entropy_coef: float = option("bonus for entropy", 0.0)
    max_norm: float = option("clip the gradients' norms to this", 1.0)
    held_out: float = option("share of the prompts kept for evaluation", 0.1)
    every: int = option("iterations between checkpoints", 20)
    seed: int = option("everything random follows from it", 0)


@dataclass(frozen=True)
class Grpo:
    model: str = option("policy to tune, and its own reference: folder or hub id")
    reward: str = option("module:function that scores texts, or folder of `rlhf-fn reward`")
    prompts: tuple[str, ...] = option("prompts: JSON, JSONL, or text (.txt) in documents or lines")
    out: str = option("folder of the run")
    recipe: str = option("method, a name in rlhf_fn/recipes.py", "grpo")
    field: str = option("which field of the records is the prompt", "prompt")
    lora: int = option("rank of adapters W + B A of all linear layers; 0: train all of W", 0)
    steps: int = option("rollouts", 100)
    batch: int = option("prompts per rollout", 16)
    group: int = option("answers per prompt; 0: as many as the recipe says", 0)
    epochs: int = option("passes over a rollout; 0: as the recipe says", 0)
    minibatches: int = option("optimizer steps per pass; 0: as the recipe says", 0)
    accumulate: int = option("micro-batches per optimizer step", 1)
    device: str = option(DEVICE, "")
    dtype: str = option(DTYPE, "float32")
    compile: int = option(COMPILE, 0)
    recompute: int = option(RECOMPUTE, 0)
    shards: int = option(SHARDS, 1)
    layerwise: int = option(LAYERWISE, 0)
    kernels: str = option(KERNELS, "")
    prompt_tokens: int = option("keep the first tokens of a prompt; 0: all of it", 0)
    new_tokens: int = option("tokens sampled per prompt at most", 64)
    stop: tuple[str, ...] = option("texts of one token that end an answer, too", ())
    lr: float = option("peak learning rate", 3e-4)
    warmup: int = option("optimizer steps of linear warm-up; linear to 0 after it", 4)
    max_norm: float = option("clip the gradient's norm to this", 1.0)
    held_out: float = option("share of the prompts kept for evaluation", 0.1)
    every: int = option("iterations between checkpoints", 20)
    seed: int = option("everything random follows from it", 0)


@dataclass(frozen=True)
class Dpo:
    model: str = option("policy to tune, and its own reference: folder or hub id")
    data: tuple[str, ...] = option("pairs, JSON or JSONL (.gz), or a .pos and a .neg file")
    out: str = option("folder of the run")
    recipe: str = option("method, a name in rlhf_fn/recipes.py", "dpo")
    lora: int = option("rank of adapters W + B A of all linear layers; 0: train all of W", 0)
    steps: int = option("optimizer steps", 200)
    batch: int = option("pairs per step", 16)
    window: int = option(WINDOW, 1)
    accumulate: int = option("micro-batches per step", 1)
    device: str = option(DEVICE, "")
    dtype: str = option(DTYPE, "float32")
    compile: int = option(COMPILE, 0)
    recompute: int = option(RECOMPUTE, 0)
    shards: int = option(SHARDS, 1)
    kernels: str = option(KERNELS, "")
    lr: float = option("peak learning rate", 1e-4)
    warmup: int = option("steps of linear warm-up; cosine to 0 after it", 20)
    max_length: int = option("tokens per text; longer ones are cut", 256)
    max_norm: float = option("clip the gradient's norm to this", 1.0)
    weight_decay: float = option("AdamW's decoupled weight decay", 0.0)
    held_out: float = option("share of the prompts kept for evaluation", 0.1)
    every: int = option("steps between evaluations and checkpoints", 50)
    seed: int = option("everything random follows from it", 0)


@dataclass(frozen=True)
class Evaluate:
    model: str = option("policy to judge: folder or hub id")
    reference: str = option("policy to compare with: folder or hub id")
    reward: str = option("judging reward model, never seen in training")
    prompts: tuple[str, ...] = option("prompts that training has not seen")
    number: int = option("prompts", 256)
    prompt_tokens: int = option("tokens of a prompt; longer ones are cut", 16)
    new_tokens: int = option("tokens sampled per prompt at most", 32)
    temperature: float = option("of sampling", 1.0)
    device: str = option(DEVICE, "")
    seed: int = option("everything random follows from it", 0)


@dataclass(frozen=True)
class Pipeline:
    out: str = option("folder of the run", "runs/pipeline")
    device: str = option(DEVICE, "")
    seed: int = option("everything random follows from it", 0)


TRAIN = Sft, Reward, Ppo, Grpo, Dpo
Config = Sft | Reward | Ppo | Grpo | Dpo | Evaluate | Pipeline

POSITIVE = {
    "steps", "batch", "accumulate", "lr", "critic_lr", "max_length", "max_norm", "patience",
    "every", "number", "prompt_tokens", "new_tokens", "temperature", "epochs", "minibatches",
    "clip", "shards", "window",
}  # fmt: skip
CHOICES = {
    "pool": ("last", "mean"),
    "dtype": ("float32", "bfloat16"),
    "compile": (0, 1),
    "recompute": (0, 1),
    "layerwise": (0, 1),
}
INPUTS = ("model", "reference", "reward", "safety", "data", "prompts")


def validate(config: Config) -> Config:
    """Return `config`, or say which option is wrong, what it was and what it may be.

    Raises:
        ConfigError: a value outside its range.
    """
    spared = {f.name for f in fields(config) if f.default == 0}  # there 0 has a meaning
    for name, value in asdict(config).items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{flag} is {value}; it must be a finite number")
        if name in POSITIVE - spared and value <= 0:
            raise ConfigError(f"{flag} is {value}; it must be greater than 0")
        if name == "max_length" and value < 2:
            raise ConfigError(f"{flag} is {value}; it must be 2 or more: a prompt and an answer")
        if name in ("discount", "lam") and not 0 <= value <= 1:
            raise ConfigError(f"{flag} is {value}; it must lie in [0, 1]")
        if name == "held_out" and not 0 < value < 1:
            raise ConfigError(f"{flag} is {value}; it must lie in (0, 1)")
        if isinstance(value, int | float) and value < 0 and name != "safety_weight":
            raise ConfigError(f"{flag} is {value}; it must not be negative")
        if name in CHOICES and value not in CHOICES[name]:
            one, other = CHOICES[name]
            raise ConfigError(f"{flag} is {value!r}; it must be {one} or {other}")
    if isinstance(config, Reward):
        part(config.part)
    if isinstance(config, TRAIN) and config.accumulate > config.batch:
        raise ConfigError(
            f"--accumulate is {config.accumulate}, more than the {config.batch} rows of --batch"
        )
    if isinstance(config, TRAIN) and config.compile and config.recompute:
        raise ConfigError("--recompute 1 does not run compiled; leave out --compile, or that")
    by_layer = isinstance(config, TRAIN) and config.recompute and config.shards > 1
    if isinstance(config, Ppo | Grpo) and config.layerwise and not by_layer:
        raise ConfigError("--layerwise 1 wants --shards and --recompute 1; add them, or leave it")
    return config


def part(text: str) -> tuple[int, int]:
    """'2/3' -> (1, 3): which part, counted from 0, of how many."""
    try:
        i, n = (int(x) for x in text.split("/"))
    except ValueError:
        raise ConfigError(f"--part is {text!r}; write it as i/n, for example 1/2") from None
    if not 1 <= i <= n:
        raise ConfigError(f"--part is {text!r}; i must lie in 1 … n")
    return i - 1, n


def inputs(config: Config) -> list[tuple[str, str]]:
    """(flag, path) of every file, folder or hub id that a run reads."""
    values = asdict(config)
    named = [(f"--{name}", values[name]) for name in INPUTS if values.get(name)]
    return [(flag, p) for flag, v in named for p in ([v] if isinstance(v, str) else v)]


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What two configurations disagree on, as 'name: before → now'."""
    names = dict.fromkeys([*before, *now])
    return [
        f"{n}: {before.get(n)!r} → {now.get(n)!r}" for n in names if before.get(n) != now.get(n)
    ]


def arguments(kind: type) -> list[tuple[str, dict[str, Any]]]:
    """argparse's (flag, keywords) for every field of a configuration."""
    rows = []
    for f in fields(kind):
        many = f.type == tuple[str, ...]
        keywords: dict[str, Any] = {"help": f.metadata["help"], "metavar": "X"}
        keywords |= {"nargs": "+"} if many else {"type": f.type}
        if f.default is MISSING:
            keywords["required"] = True
        else:
            keywords["default"] = f.default
            keywords["help"] += f" ({f.default})" if f.default not in ("", ()) else ""
        rows.append((f"--{f.name.replace('_', '-')}", keywords))
    return rows
