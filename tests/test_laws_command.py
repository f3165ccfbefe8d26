"""`rlhf-fn check`, as a person types it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlhf_fn.cli import main

MINE = """
import torch

NUMBER = 3

def mean(x, mask):
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)

def half(x, mask):
    return mean(x, mask) / 2

def gae(rewards, values, mask, discount, lam):
    raise RuntimeError("not today")
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "my_losses.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("my_losses", None)


def check(*words):
    return main(["check", *words])


def test_a_lawful_function_ends_with_0(mine, capsys):
    assert check("my_losses:mean", "--like", "token mean") == 0
    out = capsys.readouterr().out
    assert out.startswith("my_losses:mean as token mean: f(per_token [batch, time], mask)")
    assert out.endswith("7 of 7 laws hold\n")


def test_a_function_that_breaks_a_law_ends_with_1_its_input_and_the_bug(mine, capsys):
    assert check("my_losses:half", "--like", "token mean") == 1
    out = capsys.readouterr().out
    assert "BROKEN     It is the mean over all kept tokens" in out
    assert "x = [[1]]" in out and "known from: TRL #2881" in out


def test_a_skipped_law_is_not_asked(mine, capsys):
    law = "It is the mean over all kept tokens"
    assert check("my_losses:half", "--like", "token mean", "--skip", law) == 0
    assert law not in capsys.readouterr().out


def test_settings_are_stated_once_and_reach_the_function(capsys):
    assert check("rlhf_fn:gae", "--like", "gae", "--with", "discount=0.9", "lam=0.8") == 0
    assert check("rlhf_fn:gae", "--like", "gae", "--with", "discount=inf", "lam=0.8") == 1
    assert "raised ValueError: discount must be" in capsys.readouterr().out


def test_a_function_that_raises_ends_with_1_and_says_on_what(mine, capsys):
    assert check("my_losses:gae", "--like", "gae", "--with", "discount=0.9", "lam=0.8") == 1
    assert "raised RuntimeError: not today" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["my_losses:mean", "--like", "means"],
            "like='means' is no kind; the kinds are: log",
        ),
        (["my_losses.mean", "--like", "gae"], "is not package.module:function"),
        (["my_losses:middle", "--like", "gae"], "has no function 'middle'; it has"),
        (["no_such_module:f", "--like", "gae"], "No module named 'no_such_module'"),
        (["my_losses:NUMBER", "--like", "gae"], "has no function 'NUMBER'; it has"),
        (["my_losses:mean", "--like", "entropy"], "called as f(logits [batch, time, vocab])"),
        (["my_losses:gae", "--like", "gae"], "discount is missing"),
        (["my_losses:mean", "--like", "token mean", "--with", "x"], "is no NAME=VALUE"),
        (["my_losses:mean", "--like", "token mean", "--with", "x=1+"], "'1+' is no number"),
        (["my_losses:mean", "--like", "token mean", "--with", "eps=1"], "eps= is neither a param"),
        (["my_losses:mean", "--like", "token mean", "--skip", "all"], "'all' is no law of 'token"),
    ],
)
def test_a_question_that_makes_no_sense_ends_with_2_and_one_sentence(mine, words, message, capsys):
    assert check(*words) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_without_hypothesis_one_sentence_says_what_to_install():
    code = (
        "import sys; sys.modules['hypothesis'] = None; from rlhf_fn.cli import main;"
        "sys.exit(main(['check', 'rlhf_fn:k3', '--like', 'kl']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "pip install 'rlhf-fn[laws]'" in done.stderr


def test_the_help_fits_one_screen(capsys):
    with pytest.raises(SystemExit) as ended:
        check("--help")
    lines = capsys.readouterr().out.splitlines()
    assert ended.value.code == 0 and len(lines) <= 40 and max(map(len, lines)) <= 100


def test_a_table_of_peers_has_what_is_missing_what_holds_and_what_was_judged(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    import check_peers
    from peer_functions import Peer

    def pytest_library():
        yield Peer("mean", lambda x, mask: token_mean(x, mask), "token mean")
        yield Peer("half", lambda x, mask: token_mean(x, mask) / 2, "token mean")
        yield Peer("third", lambda x, mask: token_mean(x, mask) / 3, "token mean",
                   judged={"mean over all": "definition: a third"})  # fmt: skip

    def no_such_library():
        raise AssertionError("it is not there to be asked")

    def token_mean(x, mask):
        return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)

    pytest_library.__name__ = "pytest"
    monkeypatch.setattr(check_peers, "LIBRARIES", (pytest_library, no_such_library))
    check_peers.main()
    _, _, mean, half, third, missing = capsys.readouterr().out.splitlines()
    assert mean.endswith("| mean | token mean | 7 of 7 |  |")
    assert "6 of 7 | *It is the mean over all kept tokens*: the loss is 0.5" in half
    assert half.endswith("**not judged** |") and third.endswith("**definition: a third** |")
    assert missing == "| no_such_library | | | | not installed |"
