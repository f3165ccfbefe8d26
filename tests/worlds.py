"""Worlds of several ranks: processes of one machine that meet over gloo and do one thing each.

They are forked off one server that has imported everything, so that a world begins in a second.
"""

import contextlib
import io
import multiprocessing
import os
import traceback
from pathlib import Path

import torch
from torch.distributed import TCPStore

HERE = Path(__file__).parent
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch.distributed.tensor", "cases_layers"])


MEETINGS = []  # as torchrun has them: a port that was found free may be taken by another world


class Failed(Exception):
    """What a rank raised, as text."""


def world(ranks, task, *args, timeout=60.0, patience=60.0):
    """`task(*args)` on every rank: what each returned, or `Failed`, or its exit code."""
    processes = start(ranks, task, *args, timeout=timeout)
    results = [result(*each, patience=patience) for each in processes]
    for process, _ in processes:
        process.kill()
    return results


def start(ranks, task, *args, timeout=60.0):
    """The processes of a world, each with the end of a pipe that its result comes out of."""
    here, processes = "127.0.0.1", []
    meeting = TCPStore(here, 0, is_master=True, wait_for_workers=False)
    MEETINGS.append(meeting)
    for rank in range(ranks):
        ours, theirs = CONTEXT.Pipe(duplex=False)
        names = {
            "RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "MASTER_PORT": meeting.port,
            "MASTER_ADDR": here, "TORCHELASTIC_USE_AGENT_STORE": True,
        }  # fmt: skip
        process = CONTEXT.Process(target=_rank, args=(names, theirs, timeout, task, args))
        with _server_sees_tests():
            process.start()
        theirs.close()
        processes.append((process, ours))
    return processes


def _rank(names, pipe, timeout, task, args):
    from rlhf_fn import ranks

    torch.set_num_threads(1)
    os.environ.update({name: str(value) for name, value in names.items()})
    try:
        with ranks.joined(timeout=timeout):
            found = task(*args)
    except Exception as error:
        found = Failed(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
    content = io.BytesIO()
    torch.save(found, content)
    pipe.send_bytes(content.getvalue())


def result(process, pipe, patience=60.0):
    """What a rank returned, or `Failed`; its exit code if it died, or None if it does not end."""
    try:
        found = pipe.recv_bytes() if pipe.poll(patience) else None
    except EOFError:
        process.join(patience)
        return process.exitcode
    return None if found is None else torch.load(io.BytesIO(found), weights_only=False)


@contextlib.contextmanager
def _server_sees_tests():
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), before or ""])
    try:
        yield
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before
