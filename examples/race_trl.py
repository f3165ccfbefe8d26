"""The side of TRL in benchmark_trl.py: its trainers, each step timed by a callback."""

import sys
import tempfile
from collections.abc import Callable
from typing import Any

from datasets import Dataset
from race_setting import (
    ANSWER,
    BETA,
    BETAS,
    EOS,
    EPS,
    GROUP,
    KL,
    LR,
    MAX_NORM,
    PAD,
    PAIRS,
    PROMPTS,
    ROLLOUTS,
    SFT_LENGTH,
    SFT_ROWS,
    STEPS,
    UNK,
    Job,
    Lap,
    llama,
    pairs,
    prompts,
    rows,
    worth,
)  # fmt: skip
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import SequentialSampler
from transformers import PreTrainedTokenizerFast, TrainerCallback


class Timed(TrainerCallback):
    """Steps when it is asked to; `losses` are those of the training steps so far."""

    def __init__(self, lap: Lap):
        self.lap, self.losses = lap, []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.lap.start()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.lap.end(self.losses[-1] if self.losses else float("nan"))
        self.lap.start()


def tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """A token for every word: "t7" is 7."""
    core = Tokenizer(models.WordLevel({word(i): i for i in range(vocab)}, unk_token=word(UNK)))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": word(PAD), "eos_token": word(EOS), "unk_token": word(UNK)}
    return PreTrainedTokenizerFast(tokenizer_object=core, padding_side="left", **names)


def word(token: int) -> str:
    """A special one must be no part of another, where the tokenizer would find it."""
    return f"<{token}>" if token in (PAD, EOS, UNK) else f"t{token}"


def texts(ids: list[list[int]]) -> list[str]:
    return [" ".join(map(word, row)) for row in ids]


def settings(job: Job, batch: int) -> dict[str, Any]:
    return {
        "output_dir": tempfile.mkdtemp(), "use_cpu": True, "bf16": job.dtype == "bfloat16",
        "per_device_train_batch_size": batch, "learning_rate": LR, "lr_scheduler_type": "constant",
        "weight_decay": 0.0, "adam_beta1": BETAS[0], "adam_beta2": BETAS[1], "adam_epsilon": EPS,
        "max_grad_norm": MAX_NORM, "max_steps": STEPS, "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "gradient_checkpointing": False, "optim": "adamw_torch_fused",
    }  # fmt: skip


def sft(job: Job) -> Any:
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_dict({"input_ids": rows(SFT_ROWS * STEPS, SFT_LENGTH, job.vocab, 0)})
    return SFTTrainer(
        llama("policy", job.vocab), args=SFTConfig(**settings(job, SFT_ROWS)), train_dataset=data,
        processing_class=tokenizer(job.vocab),
    )  # fmt: skip


def dpo(job: Job) -> Any:
    from trl import DPOConfig, DPOTrainer

    sides = dict(zip(("prompt", "chosen", "rejected"), map(texts, pairs(job.vocab))))
    sides |= {name: [" " + text for text in sides[name]] for name in ("chosen", "rejected")}
    return DPOTrainer(
        llama("policy", job.vocab), ref_model=llama("policy", job.vocab),
        args=DPOConfig(**settings(job, PAIRS), beta=BETA), train_dataset=Dataset.from_dict(sides),
        processing_class=tokenizer(job.vocab),
    )  # fmt: skip


def reward(job: Job) -> Any:
    from trl import RewardConfig, RewardTrainer

    asked, *sides = pairs(job.vocab)
    chosen, rejected = ([p + x for p, x in zip(asked, side)] for side in sides)
    data = Dataset.from_dict({"chosen_ids": chosen, "rejected_ids": rejected})
    return RewardTrainer(
        llama("reward", job.vocab), args=RewardConfig(**settings(job, PAIRS)), train_dataset=data,
        processing_class=tokenizer(job.vocab),
    )  # fmt: skip


def grpo(job: Job) -> Any:
    from trl import GRPOConfig, GRPOTrainer

    def paid(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [worth(ids) for ids in completion_ids]

    args = GRPOConfig(
        **settings(job, PROMPTS * GROUP), num_generations=GROUP, max_completion_length=ANSWER,
        temperature=1.0, top_k=0, top_p=1.0,
    )  # fmt: skip
    return GRPOTrainer(
        llama("policy", job.vocab), reward_funcs=paid, args=args,
        train_dataset=Dataset.from_dict({"prompt": texts(prompts(PROMPTS, job.vocab))}),
        processing_class=tokenizer(job.vocab),
    )  # fmt: skip


def ppo(job: Job) -> Any:
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    given = settings(job, ROLLOUTS) | {"max_steps": -1}
    args = PPOConfig(
        **given, response_length=ANSWER, temperature=1.0, num_ppo_epochs=1, num_mini_batches=1,
        total_episodes=ROLLOUTS * STEPS, kl_coef=KL, vf_coef=1.0, num_sample_generations=0,
        stop_token="eos", local_rollout_forward_batch_size=ROLLOUTS,
    )  # fmt: skip
    data = Dataset.from_dict({"input_ids": prompts(ROLLOUTS, job.vocab)})
    return PPOTrainer(
        args, tokenizer(job.vocab), llama("policy", job.vocab), llama("policy", job.vocab),
        llama("reward", job.vocab), data, llama("value", job.vocab),
    )  # fmt: skip


JOBS: dict[str, Callable[[Job], Any]] = {
    "sft": sft, "dpo": dpo, "reward": reward, "grpo": grpo, "ppo": ppo,
}  # fmt: skip


def main() -> None:
    """python race_trl.py NAME VOCAB DTYPE"""
    name, vocab, dtype = sys.argv[1:]
    sys.stdout = sys.stderr  # the trainers print
    trainer = JOBS[name](Job(name, int(vocab), dtype))
    timed = Timed(Lap())
    trainer.add_callback(timed)
    if name in ("sft", "dpo", "reward"):  # in the order of the data, as the other side
        trainer._get_train_sampler = lambda data=None, **_: SequentialSampler(trainer.train_dataset)
    trained = trainer.training_step

    def noted(*args: Any, **more: Any) -> Any:
        loss = trained(*args, **more)
        timed.losses.append(float(loss))
        return loss

    trainer.training_step = noted
    trainer.train()


if __name__ == "__main__":
    main()
