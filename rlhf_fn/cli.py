"""rlhf-fn: align a language model from the command line."""

import argparse
import atexit
import os
import sys
import warnings
from importlib import import_module
from typing import Any, NoReturn

from rlhf_fn import config as configuration
from rlhf_fn import law_command

COMMANDS = {  # name -> (its options, the module that has it, what it does)
    "pipeline": (configuration.Pipeline, "commands", "SFT, reward model, PPO on made-up data"),
    "sft": (configuration.Sft, "commands", "tune on instructions (loss on the completions only)"),
    "reward": (configuration.Reward, "commands", "train a reward model on preference pairs"),
    "ppo": (configuration.Ppo, "commands", "tune a policy against a reward model"),
    "grpo": (configuration.Grpo, "command_grpo", "tune on groups of answers that a reward scores"),
    "dpo": (configuration.Dpo, "command_dpo", "tune on preference pairs, by DPO or a relative"),
    "evaluate": (configuration.Evaluate, "commands", "let a reward model judge two policies"),
}


SILENCE = 60.0  # seconds that one rank waits for another
COMPILING = 600.0  # the same where one may compile what another does not


class _Compact(argparse.HelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=26, width=100)

    def _format_usage(self, usage: Any, actions: Any, groups: Any, prefix: Any) -> str:
        required = [
            f" {a.option_strings[-1]} X" for a in actions if a.required and a.option_strings
        ]
        commands = [" COMMAND" for a in actions if a.nargs == argparse.PARSER]
        return f"usage: {self._prog}{''.join(commands + required)} [options]\n"


def parser() -> argparse.ArgumentParser:
    """The parser of `rlhf-fn COMMAND [options]`."""
    top = argparse.ArgumentParser(prog="rlhf-fn", description=__doc__, formatter_class=_Compact)
    commands = top.add_subparsers(dest="command", required=True, prog="rlhf-fn", metavar="COMMAND")
    for name, (kind, _, help) in COMMANDS.items():
        sub = commands.add_parser(
            name, help=help, description=help, formatter_class=_Compact, allow_abbrev=False,
            add_help=False,
        )  # fmt: skip
        sub.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)  # it is on screen
        for flag, keywords in configuration.arguments(kind):
            sub.add_argument(flag, **keywords)
        if name != "evaluate":
            sub.add_argument("--resume", action="store_true", help="go on with the run in --out")
    check = commands.add_parser("check", help=law_command.HELP, description=law_command.HELP)
    law_command.add_arguments(check)
    return top


def _config(kind: type, options: dict[str, Any]) -> configuration.Config:
    values = {n: tuple(v) if isinstance(v, list) else v for n, v in options.items()}
    return configuration.validate(kind(**values))


def main(argv: list[str] | None = None) -> int:
    """Run one command; 0 if it worked, 2 with a sentence on stderr if its input was wrong."""
    options = vars(parser().parse_args(argv))
    command, resume = options.pop("command"), options.pop("resume", False)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        if command == "check":
            return law_command.run(**options)
        kind, module, _ = COMMANDS[command]
        config = _config(kind, options)
        from transformers.utils import logging as transformers_logging  # heavy: not for --help

        transformers_logging.set_verbosity_error()  # what matters of it is an error of ours
        if not sys.stderr.isatty():
            transformers_logging.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: _say(command, f"warning: {message}")
            run = getattr(import_module(f"rlhf_fn.{module}"), command)
            import_module("rlhf_fn.allocator").keep_freed()
            gpus = config.device.startswith("cuda") if config.device else None
            silence = COMPILING if getattr(config, "compile", 0) else SILENCE
            with import_module("rlhf_fn.ranks").joined(timeout=silence, gpus=gpus):
                run(config, resume=resume)
    except (ValueError, TypeError, OSError, RuntimeError, MemoryError) as error:
        if os.environ.get("RLHF_FN_TRACEBACK"):
            raise
        _say(command, f"{type(error).__name__}: {error}{_room(error)}")
        return 2
    except KeyboardInterrupt:
        _say(command, "interrupted; --resume goes on")
        return 130
    return 0


def program() -> NoReturn:
    """`main` as a process.

    A rank ends as multiprocessing ends its children, without taking the interpreter down: a thread
    of gloo that frees a tensor then asks for an interpreter that is gone, and the process aborts
    (pytorch 179291; a mesh keeps its groups' threads beyond `destroy_process_group`).
    """
    code = main()
    if "RANK" in os.environ:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _room(error: Exception) -> str:
    """What to change where memory ran out."""
    short = "out of memory", "can't allocate memory"
    if not isinstance(error, MemoryError) and not any(x in str(error) for x in short):
        return ""
    return f"; {configuration.SMALLER}"


def _say(command: str, message: str) -> None:
    """One line on stderr, however many the message had."""
    rank = os.environ.get("RANK", "0")
    who = command if rank == "0" else f"{command} (rank {rank})"
    print(f"rlhf-fn {who}: {' '.join(message.split())}", file=sys.stderr)


if __name__ == "__main__":
    program()
