"""Another engine's answers: what they become, what is refused, and a server asked for them."""

import importlib.util
import json
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from cases_rollout import DECODER, KEYS, PAD, POLICY, PROMPT, STOP, VOCAB, padded
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fn import random
from rlhf_fn.external import importance, rollout_of
from rlhf_fn.losses import next_token_logprobs
from rlhf_fn.mismatch import masked_weights, truncated_weights
from rlhf_fn.rollout import completions, sample

LIMITS = {"max_new_tokens": 6, "vocab": VOCAB, "stop": [STOP], "pad": PAD}
OPTIONS = {"max_new_tokens": 6, "temperature": 0.7, "stop": [STOP], "pad": PAD}
once = partial(truncated_weights, clip=1.0)


def spoken(rollout):
    """The log-probs of every row as lists: what an engine says of its answers."""
    return [row[kept].tolist() for row, kept in zip(rollout.logprobs, rollout.mask)]


@settings(max_examples=20)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**31))
def test_what_an_engine_says_of_a_rollout_is_that_rollout(batch, group, seed):
    prompts = padded([[3 + (seed + i) % 9] * (1 + i) for i in range(batch)], batch + 1)
    keys = random.split(random.key(seed), batch * group)
    rollout = sample(DECODER, POLICY.params, prompts, keys, **OPTIONS)
    said = rollout_of(prompts, completions(rollout), spoken(rollout), **LIMITS)
    for ours, theirs in zip(said, rollout):
        torch.testing.assert_close(ours, theirs.to(ours.dtype))


def test_without_a_stop_an_answer_of_full_length_is_complete():
    prompts = padded([[5]], 2)
    rollout = rollout_of(prompts, [[7]], [[-0.5]], **LIMITS | {"max_new_tokens": 1, "stop": []})
    assert rollout.tokens.tolist() == [[7, 5, 7]] and rollout.mask.tolist() == [[0, 0, 1]]
    assert rollout.logprobs.tolist() == [[0.0, 0.0, -0.5]]


STOPPED, LOGS = [5, 2], [-1.0, -2.0]
WRONG = {
    "answers has 3 rows": ([STOPPED] * 3, [LOGS] * 3),
    "answers has 0 rows": ([], []),
    "logprobs has 1 rows for 2": ([STOPPED] * 2, [LOGS]),
    r"logprobs\[1\] has 1 numbers for 2": ([STOPPED] * 2, [LOGS, [-1.0]]),
    r"logprobs\[1\]\[1\] is None": ([STOPPED] * 2, [LOGS, [-1.0, None]]),
    r"logprobs\[0\]\[0\] is nan": ([STOPPED] * 2, [[torch.nan, -1.0], LOGS]),
    r"logprobs\[0\]\[1\] is -inf": ([STOPPED] * 2, [[-1.0, -torch.inf], LOGS]),
    r"logprobs\[0\]\[1\] is 0.5": ([STOPPED] * 2, [[-1.0, 0.5], LOGS]),
    r"answers\[1\]\[0\] is 13": ([STOPPED, [VOCAB, 2]], [LOGS] * 2),
    r"answers\[1\]\[0\] is -1": ([STOPPED, [-1, 2]], [LOGS] * 2),
    r"answers\[0\] goes on for 1 tokens after its stop at 0": ([[2, 5], STOPPED], [LOGS] * 2),
    r"answers\[1\] ends after 2 of 6": ([STOPPED, [5, 5]], [LOGS] * 2),
    r"answers\[1\] ends after 0 of 6": ([STOPPED, []], [LOGS, []]),
    r"answers\[0\] has 7 tokens, expected at most 6": ([[5] * 7, STOPPED], [[-1.0] * 7, LOGS]),
}


@pytest.mark.parametrize("said, given", WRONG.items(), ids=WRONG)
def test_what_cannot_be_a_rollout_is_refused_by_name(said, given):
    with pytest.raises(ValueError, match=said):
        rollout_of(PROMPT, *given, **LIMITS)


def test_ids_that_are_no_integers_are_refused():
    with pytest.raises(TypeError, match=r"answers\[0\] must hold integers|Type-check error"):
        rollout_of(PROMPT, [[5.0, 2.0], STOPPED], [LOGS] * 2, **LIMITS)


def drawn():
    rollout = sample(DECODER, POLICY.params, PROMPT, KEYS, **OPTIONS)
    assert 0 < rollout.mask.sum() < rollout.mask.numel()
    return rollout


def test_the_same_policy_weighs_one_and_is_nowhere_apart():
    rollout = drawn()
    own = next_token_logprobs(POLICY.apply, temperature=0.7)
    ours = own(POLICY.params, rollout.tokens, rollout.attention)
    weights, metrics = importance(ours, rollout, correction=partial(truncated_weights, clip=2.0))
    torch.testing.assert_close(weights, rollout.mask.double(), rtol=0, atol=1e-6)
    assert metrics["engine/difference"] < 1e-6 and metrics["engine/k3"].abs() < 1e-9
    torch.testing.assert_close(metrics["engine/sample_size"], torch.tensor(1.0).double())


@given(st.lists(st.floats(-3, 3), min_size=14, max_size=14), st.floats(0.5, 3))
def test_weights_and_metrics_are_their_formulas_and_never_read_off_the_answers(shifts, clip):
    rollout = drawn()
    shift = torch.tensor(shifts + [0.0] * 4, dtype=torch.float64).reshape(2, 9)
    ours = torch.where(rollout.mask, rollout.logprobs + shift, torch.nan)
    theirs = rollout._replace(logprobs=rollout.logprobs.masked_fill(~rollout.mask, torch.inf))
    x = shift[rollout.mask].tolist()
    expected = {
        "engine/difference": max(map(abs, x)),
        "engine/k1": -sum(x) / len(x),
        "engine/k3": sum(torch.tensor(d).expm1().item() - d for d in x) / len(x),
    }
    for correction, weight in (
        (partial(truncated_weights, clip=clip), lambda r: min(r, clip)),
        (partial(masked_weights, low=1 / clip, high=clip), None),
    ):
        weights, metrics = importance(ours, theirs, correction=correction)
        assert (weights[~rollout.mask] == 0).all() and weights.isfinite().all()
        for name, value in expected.items():
            assert metrics[name].item() == pytest.approx(value, rel=1e-5, abs=1e-6)
        if weight:
            wanted = [weight(2.718281828459045**d) for d in x]
            assert weights[rollout.mask].tolist() == pytest.approx(wanted)
            assert metrics["engine/weight"].item() == pytest.approx(sum(wanted) / len(wanted))
    ratios = [2.718281828459045**d for d in x]
    kish = sum(ratios) ** 2 / len(x) / sum(r * r for r in ratios)
    assert metrics["engine/sample_size"].item() == pytest.approx(kish)


def test_a_trainer_whose_log_probs_are_not_finite_is_refused():
    rollout = drawn()
    ours = torch.where(rollout.mask, torch.nan, rollout.logprobs)
    with pytest.raises(ValueError, match="logprobs.*nan"):
        importance(ours, rollout, correction=once)
    with pytest.raises(ValueError, match="shapes differ"):
        importance(ours[:, 1:], rollout, correction=once)


# a server of completions, and the example that asks it


def example():
    path = Path(__file__).parent.parent / "examples" / "external_engine.py"
    spec = importlib.util.spec_from_file_location("external_engine", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def answered(asked, style):
    """The body of an answer: what `sample` says, in the words of a completions server."""
    keys = random.split(random.key(asked["seed"]), asked["n"])
    rollout = sample(
        DECODER, POLICY.params, padded([asked["prompt"]], len(asked["prompt"])), keys,
        max_new_tokens=asked["max_tokens"], temperature=asked["temperature"],
        stop=asked["stop_token_ids"], pad=PAD,
    )  # fmt: skip
    choices = []
    for i, (ids, logs) in enumerate(zip(completions(rollout), spoken(rollout))):
        said = {"tokens": [f"token_id:{t}" for t in ids], "token_logprobs": logs}
        more = {"ids": {"token_ids": ids, "logprobs": said}, "names": {"logprobs": said}}
        choices.append({"index": i, "text": "...", "finish_reason": "stop"} | more.get(style, {}))
    return {"object": "text_completion", "choices": choices[::-1]}


@pytest.fixture
def server(request):
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert self.path == "/v1/completions"
            body = json.dumps(answered(asked, request.param)).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    http = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}/v1"
    http.shutdown()
    http.server_close()


ROWS = [[5, 6, 7], [8]]
ASKED = {"group": 3, "stop": [STOP], "max_new_tokens": 6, "temperature": 0.7, "seed": 4}


@pytest.mark.parametrize("server", ["ids", "names"], indirect=True)
def test_a_server_of_completions_is_an_engine(server):
    said = example().completed(server, "tiny", ROWS, **ASKED)
    rollout = rollout_of(padded(ROWS, 3), *said, **LIMITS)
    keys = torch.cat([random.split(random.key(4 + i), 3) for i in range(2)])
    expected = sample(DECODER, POLICY.params, padded(ROWS, 3), keys, **OPTIONS)
    assert completions(rollout) == completions(expected)
    own = next_token_logprobs(POLICY.apply, temperature=0.7)
    ours = own(POLICY.params, rollout.tokens, rollout.attention)
    _, metrics = importance(ours, rollout, correction=once)
    assert metrics["engine/difference"] < 1e-6


@pytest.mark.parametrize("server", ["text"], indirect=True)
def test_a_server_that_returns_text_alone_is_refused(server):
    with pytest.raises(ValueError, match="without token ids or without log-probs"):
        example().completed(server, "tiny", ROWS, **ASKED)
