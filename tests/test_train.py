"""The fold, the folder of a run, and what wrong options get."""

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from rlhf_fn import checkpoint, config, random, ranks, report
from rlhf_fn.run import opened
from rlhf_fn.train import Log, NonFiniteError, fold


def walk(state, key, step):
    """A random walk: every step depends on the state, the key and the step number."""
    new = {"x": state["x"] * 0.9 + random.normal(key, (3,)) + step}
    return new, {"loss": new["x"].sum()}


def run_fold(folder: Path, steps: int, *, iteration=walk, every=3):
    log = Log(folder / "metrics.jsonl")
    state = fold(
        iteration, {"x": torch.zeros(3)}, random.key(7), stage="walk", steps=steps, log=log,
        checkpoints=folder / "checkpoints", every=every,
    )  # fmt: skip
    return state, (folder / "metrics.jsonl").read_bytes()


@pytest.fixture
def folders(tmp_path):
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    return tmp_path / "whole", tmp_path / "broken"


@pytest.mark.filterwarnings("ignore:walk. nothing was saved yet")
@pytest.mark.parametrize("cut", [0, 1, 2, 3, 4, 6, 7, 10])
def test_a_fold_that_failed_at_any_step_goes_on_to_the_same_bits(folders, cut):
    def failing(state, key, step):
        if step == cut:
            raise KeyboardInterrupt
        return walk(state, key, step)

    whole, broken = folders
    expected, lines = run_fold(whole, 11)
    with pytest.raises(KeyboardInterrupt):
        run_fold(broken, 11, iteration=failing)
    state, resumed = run_fold(broken, 11)
    assert torch.equal(state["x"], expected["x"])
    assert resumed == lines


def test_a_finished_fold_runs_no_step_again(folders):
    whole, _ = folders
    expected, lines = run_fold(whole, 5)

    def never(state, key, step):
        raise AssertionError("a step was run again")

    state, again = run_fold(whole, 5, iteration=never)
    assert torch.equal(state["x"], expected["x"]) and again == lines


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_a_non_finite_metric_ends_the_run_and_keeps_the_last_checkpoint(folders, value):
    def diverging(state, key, step):
        new, metrics = walk(state, key, step)
        return new, metrics | ({"loss": torch.tensor(value)} if step == 4 else {})

    whole, _ = folders
    with pytest.raises(NonFiniteError, match=f"walk step 4: loss = {value}"):
        run_fold(whole, 11, iteration=diverging)
    assert checkpoint.load_latest(whole / "checkpoints").step == 3
    assert len((whole / "metrics.jsonl").read_text().splitlines()) == 4


def test_a_gradient_that_is_not_finite_ends_the_run(folders):
    def diverging(state, key, step):
        new, metrics = walk(state, key, step)
        return new, metrics | {"finite": torch.tensor(0.0)}

    with pytest.raises(NonFiniteError, match="gradient"):
        run_fold(folders[0], 2, iteration=diverging)


WALK = """
import sys, pathlib, time
sys.path.insert(0, {tests!r})
import test_train
def slowly(state, key, step):
    if step == {stuck}:
        pathlib.Path(sys.argv[1], "stuck").touch()
    time.sleep(60 if step == {stuck} else 0.01)
    return test_train.walk(state, key, step)
test_train.run_fold(pathlib.Path(sys.argv[1]), 60, iteration=slowly, every=2)
"""


def _start(folder, stuck=-1):
    code = WALK.format(tests=str(Path(__file__).parent), stuck=stuck)
    return subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _steps(folder):
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _wait_for(process, folder, steps):
    while _steps(folder) < steps and process.poll() is None:
        pass


def test_a_killed_run_goes_on_to_the_same_bits(folders):
    whole, broken = folders
    expected, lines = run_fold(whole, 60)
    for at in (5, 23, 41):
        process = _start(broken)
        _wait_for(process, broken, at)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    state, resumed = run_fold(broken, 60)
    assert torch.equal(state["x"], expected["x"])
    assert resumed == lines


def test_sigterm_finishes_the_step_saves_it_and_exits_with_143(folders):
    _, broken = folders
    process = _start(broken)
    _wait_for(process, broken, 5)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 143
    assert checkpoint.load_latest(broken / "checkpoints").step == _steps(broken)


def test_a_second_sigterm_ends_the_process_at_once(folders):
    _, broken = folders
    process = _start(broken, stuck=5)
    while not (broken / "stuck").exists() and process.poll() is None:
        pass
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(5) == -signal.SIGTERM
    assert checkpoint.load_latest(broken / "checkpoints").step == 4


def test_sigterm_in_the_last_step_ends_the_process_before_what_comes_next(folders):
    def last(state, key, step):
        os.kill(os.getpid(), signal.SIGTERM) if step == 3 else None
        return walk(state, key, step)

    with pytest.raises(SystemExit, match="143"):
        run_fold(folders[0], 4, iteration=last)
    assert checkpoint.load_latest(folders[0] / "checkpoints").step == 4
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_sigterm_while_the_ranks_ask_each_other_waits_for_the_next_step(folders, monkeypatch):
    asked = []

    def anywhere(here):
        asked.append(here)
        if len(asked) == 3:
            signal.raise_signal(signal.SIGTERM)  # the other ranks were told: not here
        return here

    monkeypatch.setattr(ranks, "anywhere", anywhere)
    with pytest.raises(SystemExit, match="143"):
        run_fold(folders[0], 9)
    assert checkpoint.load_latest(folders[0] / "checkpoints").step == 3


def test_sigterm_on_another_rank_in_the_last_step_ends_this_one_too(folders, monkeypatch):
    answers = iter([False, False, True])
    monkeypatch.setattr(ranks, "anywhere", lambda here: next(answers))
    with pytest.raises(SystemExit, match="143"):
        run_fold(folders[0], 2)
    assert checkpoint.load_latest(folders[0] / "checkpoints").step == 2


def test_a_fold_runs_in_any_thread(folders):
    with ThreadPoolExecutor() as pool:
        state, _ = pool.submit(run_fold, folders[0], 3).result()
    assert torch.equal(state["x"], run_fold(folders[1], 3)[0]["x"])


@pytest.mark.parametrize("damage", [lambda b: b[:-9], lambda b: b.replace(b"0", b"1", 1), None])
def test_a_log_that_was_changed_is_refused_and_what_comes_after_a_checkpoint_is_not_trusted(
    folders, damage
):
    whole, _ = folders
    expected, lines = run_fold(whole, 4)
    log = whole / "metrics.jsonl"
    log.write_bytes(damage(lines) if damage else lines + b"what a dying process wrote" * 99)
    if damage:
        with pytest.raises(checkpoint.CorruptCheckpoint, match="metrics.jsonl.*restore the file"):
            run_fold(whole, 4)
    else:
        assert run_fold(whole, 9)[1] == run_fold(folders[1], 9)[1]


def test_the_checkpoints_of_another_stage_are_refused(folders):
    run_fold(folders[0], 4)
    with pytest.raises(checkpoint.IncompatibleCheckpoint, match="stage: .* has walk.* has sprint"):
        fold(
            walk, {"x": torch.zeros(3)}, random.key(7), stage="sprint", steps=9, every=3,
            log=Log(folders[0] / "metrics.jsonl"), checkpoints=folders[0] / "checkpoints",
        )  # fmt: skip


def test_a_run_that_begins_again_at_zero_says_so(folders):
    def failing(state, key, step):
        if step == 2:
            raise KeyboardInterrupt
        return walk(state, key, step)

    with pytest.raises(KeyboardInterrupt):
        run_fold(folders[0], 9, iteration=failing)
    with pytest.warns(UserWarning, match="walk: nothing was saved yet; it begins at step 0 again"):
        run_fold(folders[0], 9)


def test_a_folder_holds_one_run_with_one_set_of_options(tmp_path):
    first = config.Pipeline(out=str(tmp_path / "run"))
    with pytest.raises(config.ConfigError, match="no run"), opened(first, resume=True):
        pass
    with opened(first, resume=False) as run:
        assert json.loads((run.directory / "config.json").read_text())["command"] == "pipeline"
        with pytest.raises(checkpoint.CheckpointLocked), opened(first, resume=True):
            pass
    with pytest.raises(config.ConfigError, match="--resume"), opened(first, resume=False):
        pass
    other = config.Pipeline(out=first.out, seed=1)
    with pytest.raises(config.ConfigError, match="seed: 0 → 1"), opened(other, resume=True):
        pass
    with opened(first, resume=True):
        pass


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(checkpoint.StorageError, match="--out"):
        with opened(config.Pipeline(out=str(tmp_path / "file")), resume=False):
            pass


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"steps": 0}, "--steps"),
        ({"lr": float("nan")}, "--lr"),
        ({"held_out": 1.0}, "--held-out"),
        ({"accumulate": 17}, "--accumulate"),
        ({"warmup": -1}, "--warmup"),
    ],
)
def test_an_option_out_of_range_is_named(changes, message):
    with pytest.raises(config.ConfigError, match=message):
        config.validate(config.Sft(model="m", data=("d",), out="o", **changes))


@pytest.mark.parametrize("part", ["", "0/2", "3/2", "1", "a/b"])
def test_a_part_is_i_of_n(part):
    with pytest.raises(config.ConfigError, match="--part"):
        config.part(part)
    assert config.part("2/3") == (1, 3)


def test_wilsons_interval_is_newcombes_published_one():
    # 81 of 263 and 0 of 20: Newcombe 1998, table I, https://doi.org/10.1002/(SICI)1097-0258(19980430)17:8
    assert [round(x, 4) for x in report.wilson(81, 263)] == [0.308, 0.2553, 0.3662]
    assert [round(x, 4) for x in report.wilson(0, 20)] == [0.0, 0.0, 0.1611]


def test_ties_are_half_a_win():
    assert report.win_rate([1.0, 2.0, 0.0], [1.0, 1.0, 1.0]).mean == 0.5
