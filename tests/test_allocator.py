"""A process that keeps what it frees takes pages from the system once, and knows what it has."""

import os
import subprocess
import sys

import pytest
import torch

from rlhf_fn import allocator, room
from rlhf_fn.cli import main

SIZE = 2**28
PROGRAM = f"""
import resource, torch
from rlhf_fn import room
from rlhf_fn.allocator import keep_freed, kept

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def used():
    before = faults()
    torch.ones({SIZE} // 4)
    return faults() - before

keeps = keep_freed()
faults_of = [used() for _ in range(24)]
print(int(keeps), min(faults_of), kept())
"""
linux = pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc is asked")


def asked(**environment):
    """(whether freed memory is kept, fewest page faults of a tensor of 24 alike, bytes kept)"""
    usual = {x: v for x, v in os.environ.items() if not x.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**usual, **environment}, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    return tuple(map(int, done.stdout.split()))


@linux
def test_pages_of_freed_tensors_are_had_from_the_system_a_few_times_at_most():
    """More than once as a hole may be a few bytes too small for what it held: see `keep_freed`."""
    keeps, faults, free = asked()
    assert keeps
    assert faults < 100
    assert SIZE <= free < 12 * SIZE, "of 24"


@linux
@pytest.mark.parametrize(
    "told", [{"MALLOC_ARENA_MAX": "2"}, {"GLIBC_TUNABLES": "glibc.rtld.nns=4"}]
)
def test_what_the_environment_says_stands(told):
    keeps, faults, free = asked(**told)
    assert not keeps
    assert faults >= SIZE // 2**22, "pages are of 4 KiB, or of 2 MiB"
    assert free < SIZE


def test_what_is_kept_can_be_had(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(room, "kept", lambda: 0)
    without = room.free_memory(cpu)
    monkeypatch.setattr(room, "kept", lambda: 2**40)
    assert room.free_memory(cpu) > without + 2**39


def test_a_command_keeps_what_it_frees(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(allocator, "keep_freed", lambda: asked.append(True))
    nowhere = str(tmp_path / "nothing")
    assert main(["sft", "--model", nowhere, "--data", nowhere, "--out", nowhere]) == 2
    assert asked == [True]
