"""Keys and streams: the published vectors, disjoint streams, and the shape of each distribution."""

import math

import pytest
import torch
import torch._dynamo.testing
from cases_ground import INTEGER_CASES, keys, seeds
from hypothesis import given
from hypothesis import strategies as st
from torch.func import vmap

from rlhf_fn import random

WORD = 0xFFFFFFFF
VECTORS = [  # counter, key, output; threefry2x32 of 20 rounds in Random123's tests/kat_vectors
    ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
    ((WORD, WORD), (WORD, WORD), (0x1CB996FC, 0xBB002BE7)),
    ((0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xC4923A9C, 0x483DF7A0)),
]


def oracle(counter, key):
    """Threefry-2x32-20 on Python integers, after figure 2 of Salmon et al. 2011."""
    schedule = [*key, key[0] ^ key[1] ^ 0x1BD11BDA]
    x = [(counter[0] + key[0]) % 2**32, (counter[1] + key[1]) % 2**32]
    for i, r in enumerate([13, 15, 26, 6, 17, 29, 16, 24] * 2 + [13, 15, 26, 6], start=1):
        x[0] = (x[0] + x[1]) % 2**32
        x[1] = ((x[1] * 2**r) % 2**32 + x[1] // 2 ** (32 - r)) ^ x[0]
        if i % 4 == 0:
            x[0] = (x[0] + schedule[i // 4 % 3]) % 2**32
            x[1] = (x[1] + schedule[(i // 4 + 1) % 3] + i // 4) % 2**32
    return tuple(x)


def pairs(words):
    return [tuple(pair) for pair in words.reshape(-1, 2).tolist()]


def distance(samples, cdf):
    """Kolmogorov-Smirnov: sup |empirical − cdf|·√n, above 2.2 with probability 1e-4."""
    x = cdf(samples.double().flatten().sort().values)
    n = x.numel()
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    return max((steps[1:] - x).max(), (x - steps[:-1]).max()) * math.sqrt(n)


@pytest.mark.parametrize(("counter", "key", "output"), VECTORS)
def test_the_hash_gives_the_published_vectors(counter, key, output):
    words = [torch.tensor(word) for word in (*key, *counter)]
    assert tuple(int(word) for word in random._threefry(*words)) == output
    assert oracle(counter, key) == output


@given(seeds, st.integers(-(2**62), 2**63 - 1))
def test_every_stream_is_the_hash_of_its_own_counters(seed, data):
    key, words = random.key(seed), (seed >> 32, seed & WORD)
    assert pairs(random.bits(key, (3, 2))) == [oracle((2**31, i), words) for i in range(3)]
    assert pairs(random.split(key, 3)) == [oracle((2**31 + 1, i), words) for i in range(3)]
    assert pairs(random.fold_in(key, data)) == [oracle((data >> 32 & WORD, data & WORD), words)]


@given(seeds, st.sets(st.integers(-(2**62), 2**63 - 1), max_size=20))
def test_no_key_is_handed_out_twice(seed, data):
    key = random.key(seed)
    data = torch.tensor(sorted(data | set(range(-100, 100))))
    handed = pairs(random.split(key, 200)) + pairs(random.fold_in(key, data))
    handed += pairs(random.bits(key, (200, 2)))
    assert len(set(handed)) == len(handed) == 400 + len(data)


@given(seeds, st.integers(0, 9), st.integers(0, 9))
def test_asking_for_more_does_not_change_what_came_before(seed, few, more):
    key = random.key(seed)
    for draw in (random.bits, random.uniform, random.gumbel, random.normal):
        assert torch.equal(draw(key, (few,)), draw(key, (few + more,))[:few])
        assert torch.equal(draw(key, (few, 3)), draw(key, (few * 3,)).reshape(few, 3))
        assert draw(key).shape == () and torch.equal(draw(key), draw(key, (1,))[0])
    assert torch.equal(random.split(key, few), random.split(key, few + more)[:few])


@pytest.mark.parametrize("name", INTEGER_CASES)
def test_it_is_its_own_vmap_and_writes_to_no_argument(name):
    function, inputs = INTEGER_CASES[name]
    args = inputs()
    before = [x.clone() for x in args]
    assert torch.equal(vmap(function)(*args), function(*args))
    assert torch.equal(vmap(vmap(function))(*[x[None] for x in args]), function(*args)[None])
    assert all(torch.equal(x, y) for x, y in zip(args, before))


@pytest.mark.compile
@pytest.mark.parametrize("name", INTEGER_CASES)
def test_it_compiles_to_one_graph_with_the_same_bits(name):
    function, inputs = INTEGER_CASES[name]
    args = inputs()
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args), function(*args))


@pytest.mark.slow  # 25 s of C++
@pytest.mark.compile
def test_the_compiler_generates_code_with_the_same_bits():
    torch._dynamo.reset()
    draw = torch.compile(
        lambda key, row: random.bits(random.fold_in(key, row), (9,)), fullgraph=True
    )
    key, row = random.key(7), torch.tensor(2**33 + 5)
    assert torch.equal(draw(key, row), random.bits(random.fold_in(key, row), (9,)))


@pytest.mark.compile
def test_counting_steps_with_an_int_does_not_compile_again_for_each():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(random.fold_in, fullgraph=True, backend=counter)
    for step in range(2, 9):
        assert torch.equal(compiled(random.key(1), step), random.fold_in(random.key(1), step))
    assert counter.frame_count <= 2


@given(seeds, st.integers(-(2**40), 2**40))
def test_folding_an_int_is_folding_a_tensor(seed, data):
    key = random.key(seed)
    assert torch.equal(random.fold_in(key, data), random.fold_in(key, torch.tensor(data)))
    rows = torch.tensor([data, data + 1])
    each = vmap(random.fold_in, in_dims=(None, 0))(key, rows)
    assert torch.equal(each, random.fold_in(key, rows))
    assert torch.equal(random.fold_in(random.split(key), data), vmap(
        lambda k: random.fold_in(k, data)
    )(random.split(key)))  # fmt: skip


@pytest.mark.parametrize("word", [0, 1, WORD // 2, WORD - 1, WORD])
def test_every_word_makes_a_finite_number(monkeypatch, word):
    monkeypatch.setattr(random, "bits", lambda key, shape: torch.full(tuple(shape), word))
    key = random.key(0)
    assert random.gumbel(key, (1,)).isfinite() and -3.2 < random.gumbel(key, (1,)) < 22.9
    assert random.normal(key, (1,)).isfinite() and random.normal(key, (1,)).abs() < 6.4
    assert 0 <= random.uniform(key, (1,)) < 1


STREAMS = {
    "one key": lambda draw: draw(random.key(3), (200_000,)),
    "split keys": lambda draw: draw(random.split(random.key(3), 100_000), (2,)),
    "folded keys": lambda draw: draw(random.fold_in(random.key(3), torch.arange(100_000)), (2,)),
    "seeds": lambda draw: draw(torch.stack([random.key(i) for i in range(20_000)]), (2,)),
}


@pytest.mark.parametrize("stream", STREAMS)
def test_draws_follow_their_distribution_along_every_stream(stream):
    draws = STREAMS[stream]
    assert distance(draws(random.uniform), lambda x: x) < 2.2
    assert distance(draws(random.normal), torch.special.ndtr) < 2.2
    assert distance(draws(random.gumbel), lambda x: torch.exp(-torch.exp(-x))) < 2.2
    x = draws(random.normal).double().flatten()
    correlation = (x[1:] * x[:-1]).mean() * math.sqrt(x.numel())
    assert correlation.abs() < 4


def test_the_bits_of_neighbouring_keys_differ_in_half_of_their_places():
    words = random.bits(random.fold_in(random.key(0), torch.arange(5000)))
    flipped = words[1:] ^ words[:-1]
    ones = torch.stack([(flipped >> i & 1).double().mean() for i in range(32)])
    assert (ones - 0.5).abs().max() * 2 * math.sqrt(5000) < 5


@given(seeds, st.integers(0, 40))
def test_a_permutation_has_every_number_once_and_depends_on_the_key_alone(seed, n):
    key = random.key(seed)
    order = random.permutation(key, n)
    assert sorted(order.tolist()) == list(range(n))
    torch.manual_seed(seed % 2**32)
    assert torch.equal(random.permutation(key, n), order)


def test_every_permutation_is_equally_likely():
    orders = random.permutation(random.split(random.key(5), 24_000), 4)
    codes = (orders * torch.tensor([64, 16, 4, 1])).sum(-1)
    counts = torch.unique(codes, return_counts=True)[1]
    assert counts.numel() == 24
    assert ((counts - 1000) ** 2 / 1000).sum() < 60  # chi-square, 23 degrees, 1e-4 at 59


@pytest.mark.parametrize(
    ("call", "error", "names"),
    [
        (lambda: random.key(-1), ValueError, "seed"),
        (lambda: random.key(2**64), ValueError, "seed"),
        (lambda: random.key(1.0), TypeError, "seed"),
        (lambda: random.key(True), TypeError, "seed"),
        (lambda: random.bits(torch.zeros(2)), TypeError, "key"),
        (lambda: random.bits(torch.zeros(3, dtype=torch.int64)), (ValueError, TypeError), "key"),
        (lambda: random.split(keys(), -1), ValueError, "num"),
        (lambda: random.permutation(keys(), -1), ValueError, "n must"),
        (lambda: random.fold_in(keys(), torch.tensor(1.0)), TypeError, "data"),
        (lambda: random.fold_in(keys(3), torch.arange(2)), ValueError, "data"),
    ],
)
def test_a_bad_argument_is_named(call, error, names):
    with pytest.raises(error, match=names):
        call()
