import json
import os
import re

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start: several tests run at once
os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels are decorated when they are imported
if os.environ["TRITON_INTERPRET"] == "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what needs a GPU is in kernels/benchmarks/gpu.py

import pytest
import torch
import triton
import triton.runtime.interpreter as interpreter
from hypothesis import Phase, settings

settings.register_profile("fn", deadline=None, derandomize=True, print_blob=True, max_examples=50)
first = [Phase.explicit, Phase.generate]  # of a planted bug any example will do
settings.register_profile("first", settings.get_profile("fn"), phases=first)
settings.load_profile("fn")
torch.set_num_threads(1)

if (
    triton.__version__ < "3.7"
):  # NumPy 2.4 refuses its int(): github.com/triton-lang/triton/issues/9171
    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


PLAIN = "misuse|test_kernels|test_resume|test_storage"


def pytest_collection_modifyitems(items):
    """Mark as `plain` what has to be run where annotations are not enforced.

    Enforcing breaks graphs, and complains of a wrong argument before we do; kernels say no shapes.
    """
    for item in items:
        marks = {mark.name for mark in item.iter_markers()}
        if marks & {"slow", "compile"} or re.search(PLAIN, item.nodeid):
            item.add_marker("plain")


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A tiny toy policy saved as a folder, and files of instructions, pairs and prompts."""
    import tiny

    from rlhf_fn import random, toy

    folder = tmp_path_factory.mktemp("small")
    tiny.save_toy(folder / "model")
    asked = toy.prompts()[:40]
    told = toy.demonstrations(asked, random.key(0))
    records = {
        "instructions": [{"prompt": p, "completion": a} for p, a in told],
        "pairs": [pair._asdict() for pair in toy.preferences(asked, random.key(1))],
        "prompts": [{"prompt": p} for p in asked],
    }
    for name, rows in records.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
    return folder
