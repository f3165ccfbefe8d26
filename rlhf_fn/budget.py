"""What a run takes of each rank, on paper: `python -m rlhf_fn.budget` prints the README's table.

Parameters, gradients and AdamW's moments are float32, the model computes in bfloat16, and a frozen
base is bfloat16 and whole on every rank, but for `adapted_budget`. Activations come on top: they
grow with the tokens of a micro-batch, not with the ranks.
"""

from typing import NamedTuple

from rlhf_fn import checks

WIDE, HALF = 4, 2  # bytes of a float32 and of a bfloat16


class Sizes(NamedTuple):
    """A Llama: `keys` is the width of the keys of all heads, and of the values."""

    layers: int
    width: int
    inner: int
    keys: int
    vocab: int


class Budget(NamedTuple):
    """Bytes of one rank: kept between steps, besides while a step is made, and sent for it."""

    kept: float
    during: float
    sent: float


LLAMAS = {  # Touvron et al. 2023, https://arxiv.org/abs/2307.09288
    "7B": Sizes(layers=32, width=4096, inner=11008, keys=4096, vocab=32000),
    "70B": Sizes(layers=80, width=8192, inner=28672, keys=1024, vocab=32000),
}


def parameters(sizes: Sizes) -> int:
    """P = 2 V d + L (2 d² + 2 d k + 3 d f + 2 d) + d, with an untied head."""
    layers, d, f, k, vocab = sizes
    return 2 * vocab * d + layers * (2 * d * d + 2 * d * k + 3 * d * f + 2 * d) + d


def outside_layers(sizes: Sizes) -> int:
    """O = 2 V d + d: the embedding, the head and the last norm."""
    return parameters(sizes._replace(layers=0))


def adapter_parameters(sizes: Sizes, rank: int) -> int:
    """A = L r (4 d + 2 (d + k) + 3 (d + f)): rank r in every linear layer but the head.

    Raises:
        ValueError: `rank` is below 1.
    """
    checks.count(least=1, rank=rank)
    layers, d, f, k, _ = sizes
    return layers * rank * (2 * (d + d) + 2 * (d + k) + 3 * (d + f))


def data_parallel_budget(*, trained: int, frozen: int, ranks: int) -> Budget:
    """Of `ranks.data_parallel`, for T trained and F frozen parameters on N ranks.

    kept = 12 T + 2 F,   during = 8 T + 2 T,   sent = 2 (N − 1)/N · 4 T for each micro-batch

    During a step: the gradients, the copy that is summed, and the trained in half precision.

    Raises:
        ValueError: `trained` or `ranks` is below 1, or `frozen` below 0.
    """
    checks.count(least=1, trained=trained, ranks=ranks)
    checks.count(least=0, frozen=frozen)
    kept = 3 * WIDE * trained + HALF * frozen
    return Budget(kept, (2 * WIDE + HALF) * trained, 2 * WIDE * trained * (ranks - 1) / ranks)


def sharded_budget(*, trained: int, frozen: int, shards: int, replicas: int = 1) -> Budget:
    """Of `sharding.fully_sharded`: S shards, R times over.

    kept = 12 T/S + 2 F,   during = 4 T/S + 4 T + 2 T,
    sent = 2 (S − 1)/S · 4 T + 2 (R − 1)/R · 4 T/S for each micro-batch

    During a step: the slices of the gradients, and every leaf whole, as it is and in half
    precision. Sent: the slices, to be gathered, those of the gradients, to be summed, and over the
    replicas.

    Raises:
        ValueError: `trained`, `shards` or `replicas` is below 1, or `frozen` below 0.
    """
    checks.count(least=1, trained=trained, shards=shards, replicas=replicas)
    checks.count(least=0, frozen=frozen)
    slices = WIDE * trained / shards
    within = 2 * WIDE * trained * (shards - 1) / shards
    across = 2 * slices * (replicas - 1) / replicas
    kept = 3 * slices + HALF * frozen
    return Budget(kept, slices + (WIDE + HALF) * trained, within + across)


def by_layer_budget(*, trained: int, layer: int, outside: int, frozen: int, shards: int) -> Budget:
    """Of `sharding.fully_sharded` with `slices`: whole at a time are a layer, L, and what none has.

    kept = 12 T/S + 2 F,   during = 4 T/S + 4 (L + O) + 2 (L + O),
    sent = (S − 1)/S · 4 (3 T − O) for each micro-batch

    Sent: the slices, to be gathered, those of layers backward once more, and the gradients'. What
    is not counted: gradients of a layer, and of what none has, that are whole until they are sent.

    Raises:
        ValueError: `trained`, `layer`, `outside` or `shards` is below 1, or `frozen` below 0.
    """
    checks.count(least=1, trained=trained, layer=layer, outside=outside, shards=shards)
    checks.count(least=0, frozen=frozen)
    slices = WIDE * trained / shards
    sent = WIDE * (3 * trained - outside) * (shards - 1) / shards
    during = slices + (WIDE + HALF) * (layer + outside)
    return Budget(3 * slices + HALF * frozen, during, sent)


def adapted_budget(*, adapter: int, base: int, layers: int, outside: int, shards: int) -> Budget:
    """As by layer, of an adapter of A parameters, l a layer, on a base of F in slices, L a layer.

    kept = (12 A + 2 F)/S,   during = 4 A/S + 2 (L + O) + 6 l,
    sent = (S − 1)/S · (2 (2 F − O) + 12 A) for each micro-batch

    Raises:
        ValueError: an argument is below 1.
    """
    checks.count(least=1, adapter=adapter, base=base, layers=layers, outside=outside, shards=shards)
    kept = (3 * WIDE * adapter + HALF * base) / shards
    frozen = HALF * ((base - outside) / layers + outside)
    during = WIDE * adapter / shards + frozen + (WIDE + HALF) * adapter / layers
    sent = HALF * (2 * base - outside) + 3 * WIDE * adapter
    return Budget(kept, during, sent * (shards - 1) / shards)


def rollout_budget(*, sampled: int, layer: int, outside: int, shards: int) -> Budget:
    """Of a rollout by layer (`sampler.by_layer`), of P parameters in slices.

    kept = 2 P/S,   during = 2 (L + O),   sent = (S − 1)/S · 2 (P − O) for each token

    Sent whatever the number of rows, each of which has its token of it; 2 O more, once. Keys and
    values come on top.

    Raises:
        ValueError: an argument is below 1.
    """
    checks.count(least=1, sampled=sampled, layer=layer, outside=outside, shards=shards)
    sent = HALF * (sampled - outside) * (shards - 1) / shards
    return Budget(HALF * sampled / shards, HALF * (layer + outside), sent)


def table(ranks: int, rank: int = 16) -> str:
    """Both Llamas, all of it and an adapter of that rank, in gigabytes (10⁹), as Markdown."""
    lines = [
        f"| Llama 2, {ranks} ranks | trained | kept, GB | in a step, GB more | sent a step, GB |",
        "|---|---|---|---|---|",
    ]
    for name, sizes in LLAMAS.items():
        whole, adapter = parameters(sizes), adapter_parameters(sizes, rank)
        outside = outside_layers(sizes)
        layer = (whole - outside) // sizes.layers
        rows = {
            "data parallel, all": data_parallel_budget(trained=whole, frozen=0, ranks=ranks),
            "fully sharded, all": sharded_budget(trained=whole, frozen=0, shards=ranks),
            "fully sharded by layer, all": by_layer_budget(
                trained=whole,
                layer=layer,
                outside=outside,
                frozen=0,
                shards=ranks,
            ),  # fmt: skip
            f"data parallel, LoRA of rank {rank}": data_parallel_budget(
                trained=adapter, frozen=whole, ranks=ranks
            ),
            f"fully sharded by layer, LoRA of rank {rank}": adapted_budget(
                adapter=adapter,
                base=whole,
                layers=sizes.layers,
                outside=outside,
                shards=ranks,
            ),
            "a rollout by layer (sent a token)": rollout_budget(
                sampled=whole, layer=layer, outside=outside, shards=ranks
            ),
        }
        for how, budget in rows.items():
            trained = "" if "rollout" in how else f"{adapter if 'LoRA' in how else whole:,}"
            numbers = " | ".join(f"{x / 1e9:.2f}" for x in budget)
            lines.append(f"| {name}, {how} | {trained} | {numbers} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(ranks=16))
