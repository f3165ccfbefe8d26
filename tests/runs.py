"""Runs of `rlhf-fn` as processes of their own, to be killed, and what they leave behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

SIZES = ("--steps", 24, "--batch", 4, "--every", 3)
PPO = ("--target-kl", 0.05, "--new-tokens", 6, "--epochs", 2, "--minibatches", 2, "--lr", 1e-2)
EARLY = ("--patience", 2, "--lr", 0.05)  # the held-out loss soon rises
PIPELINE = """
import sys
from dataclasses import replace
from rlhf_fn import cli, pipeline, toy
settings, prompts = pipeline.settings, toy.prompts

def small(out, seed):
    sft, reward, ppo = settings(out, seed)
    return (replace(sft, steps=8, batch=8, every=3), replace(reward, steps=6, batch=4, every=2),
            replace(ppo, steps=6, batch=8, new_tokens=8, every=2, target_kl=0.05))

pipeline.settings = small
sys.exit(cli.main(sys.argv[1:]))
"""


_PATHS = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])


def words_of(small, scores) -> dict[str, tuple]:
    """The options of each command on the toy files, without --out."""
    model = ("--model", small / "model")
    return {
        "sft": ("sft", *model, "--data", small / "instructions.jsonl", *SIZES),
        "reward": ("reward", *model, "--data", small / "pairs.jsonl", *SIZES, *EARLY),
        "dpo": ("dpo", *model, "--data", small / "pairs.jsonl", *SIZES, "--recipe", "kto"),
        "ppo": ("ppo", *model, "--reward", scores, "--prompts", small / "prompts.jsonl",
                *SIZES, *PPO),
        "grpo": ("grpo", *model, "--reward", "rewards_of_text:kindness", *SIZES, "--group", 3,
                 "--prompts", small / "prompts.jsonl", "--new-tokens", 6, "--epochs", 2,
                 "--minibatches", 2, "--lr", 1e-2),
    }  # fmt: skip


def start(*words, program=("-m", "rlhf_fn.cli"), **options) -> subprocess.Popen:
    """`rlhf-fn words`, in a process of its own."""
    return subprocess.Popen(
        [sys.executable, *program, *map(str, words)],
        env=os.environ | {"PYTHONPATH": _PATHS},
        cwd=Path(__file__).parents[1],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def steps_in(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_steps(process: subprocess.Popen, out: Path, steps: int) -> None:
    while steps_in(out) < steps and process.poll() is None:
        time.sleep(0.001)


def kill(process: subprocess.Popen, out: Path, steps: int, delay: float = 0.0) -> bool:
    """SIGKILL once the log has `steps` lines, `delay` seconds later; whether that was in time."""
    wait_for_steps(process, out, steps)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return process.returncode == -signal.SIGKILL


def resume(out: Path) -> tuple[str, ...]:
    """`--resume`, if the process lived long enough to begin a run."""
    return ("--resume",) if (out / "config.json").exists() else ()


def bits(out: Path) -> dict[str, bytes]:
    """Every byte that a finished run stands by: models, report, log and last checkpoints."""
    stages = sorted((out / "checkpoints").iterdir())
    last = [max((s.iterdir()), key=lambda p: p.name) for s in stages]
    trained = [out / name for name in ("policy", "reward_model") if (out / name).exists()]
    folders = {f"{f.parent.name}/{f.name}": f for f in last} | {f.name: f for f in trained}
    files = {f"{k}/{p.name}": p for k, f in folders.items() for p in sorted(f.iterdir())}
    files |= {name: out / name for name in ("metrics.jsonl", "report.md")}
    return {name: path.read_bytes() for name, path in files.items()}
