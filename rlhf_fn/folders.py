"""A model as a folder that transformers reads and writes: safetensors alone, and whole."""

from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel


def saved_dtype(path: str | PathLike[str]) -> torch.dtype:
    """The dtype of all tensors in the safetensors of a folder; float32 where they have several.

    And where they cannot be read, which `load` says, or are not in a folder but on the hub.
    """
    kinds = set()
    for file in Path(path).glob("*.safetensors"):
        try:
            with safe_open(file, "pt") as tensors:
                kinds |= {tensors.get_slice(name).get_dtype() for name in tensors.keys()}
        except SafetensorError:
            return torch.float32
    halves = {"BF16": torch.bfloat16, "F16": torch.float16}
    return halves.get(kinds.pop(), torch.float32) if len(kinds) == 1 else torch.float32


def load(
    auto: Any,
    path: str | PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    head: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """`auto.from_pretrained(path)` in `dtype`, from safetensors, with no weight drawn at random.

    With `head`, the weights above the backbone may be drawn: they are to be trained.
    """
    exact = {"dtype": dtype, "use_safetensors": True, "ignore_mismatched_sizes": True}
    try:
        module, info = auto.from_pretrained(path, output_loading_info=True, **exact, **options)
    except ValueError as error:
        raise TypeError(f"{path}: {auto.__name__} cannot load this model: {error}") from error
    except SafetensorError as error:
        raise OSError(f"{path}: its safetensors are damaged: {error}; copy them again") from error
    body = f"{module.base_model_prefix}."
    drawn = sorted({*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])})
    if head:
        drawn = [name for name in drawn if name.startswith(body) and "pooler" not in name]
    if drawn:
        raise ValueError(
            f"{path} has no weights for {', '.join(drawn)} (or of other shapes), which would be "
            f"drawn at random; expected what a {type(module).__name__} saves"
        )
    return module.eval()


def save(bare: PreTrainedModel, params: dict[str, Tensor], directory: str | PathLike[str]) -> None:
    """Write `params`, if they have its names and shapes, as safetensors of the class of `bare`.

    `bare`, of which only that is read, has no weights, and takes on the dtypes of `params`.
    """
    expected = {name: tuple(p.shape) for name, p in bare.named_parameters()}
    got = {name: tuple(p.shape) for name, p in params.items()}
    if wrong := sorted(dict(expected.items() ^ got.items())):
        first = wrong[0]
        raise ValueError(
            f"params do not fit {type(bare).__name__}: {first} is {got.get(first)}, expected "
            f"{expected.get(first)}; save what the same constructor made from the same module"
        )
    for name, p in bare.named_parameters():  # the config says the dtype of the module
        p.data = torch.empty_like(p, dtype=params[name].dtype)
    aliases = {name for name, _ in bare.named_parameters(remove_duplicate=False)}
    buffers = {name: x for name, x in bare.state_dict().items() if name not in aliases}
    tensors = {name: p.detach().cpu().contiguous() for name, p in params.items()}
    bare.save_pretrained(directory, state_dict=buffers | tensors)
