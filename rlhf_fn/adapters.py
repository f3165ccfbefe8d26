"""Adapters as folders that PEFT reads and writes: `adapter_model.safetensors` and its config.

https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

import json
import re
import warnings
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf_fn import tree
from rlhf_fn.lora import Lora, by_rank, by_root_rank, named, require_fit, target_layers
from rlhf_fn.models import Params

WEIGHTS, CONFIG, PICKLE = "adapter_model.safetensors", "adapter_config.json", "adapter_model.bin"
_PREFIX = "base_model.model."
_NEEDED = ("peft_type", "r", "lora_alpha", "target_modules")
_READ = {*_NEEDED, "use_rslora", "init_lora_weights", "lora_dropout"}
_INITS = (None, True, False, "gaussian", "orthogonal")  # the others change the base weights
_ASIDE = {  # settings that change no number
    "auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "inference_mode", "megatron_core",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip


def save_adapter(
    module: PreTrainedModel, adapter: Params, low_rank: Lora, directory: str | PathLike[str]
) -> None:
    """Write an adapter of `causal_lm(module)` for `peft.PeftModel.from_pretrained(module, …)`.

    Raises:
        ValueError: `adapter` does not fit, or PEFT does not know the `scale`.
    """
    layers = target_layers(module, low_rank)
    require_fit(layers, adapter, low_rank, "adapter")
    if low_rank.scale not in (by_rank, by_root_rank):
        raise ValueError(
            f"scale {low_rank.scale} is none that PEFT has; save with by_rank and alpha = s · rank"
        )
    meant = {name for name, _ in module.named_modules() if named(name, low_rank.targets)}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if module.get_output_embeddings() is not None else None,
        "base_model_name_or_path": module.config.name_or_path or None,
        "r": low_rank.rank,
        "lora_alpha": low_rank.alpha,
        "use_rslora": low_rank.scale is by_root_rank,
        "target_modules": [*(low_rank.targets if meant == layers.keys() else layers)],
        "fan_in_fan_out": any(isinstance(layer, Conv1D) for layer in layers.values()),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    tensors = {_PREFIX + name: x.detach().contiguous() for name, x in adapter.items()}
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_adapter(module: PreTrainedModel, directory: str | PathLike[str]) -> tuple[Params, Lora]:
    """The adapter that `save_adapter` or PEFT wrote, on the device of `module`; no pickle.

    float32 from half precision. A dropout it was trained with is left out, with a warning.

    Raises:
        OSError: a file is missing or damaged, or there is a pickle alone.
        ValueError: it is of another module, or asks for what `lora` does not do (DoRA, biases,
            a rank for each layer, …).
    """
    folder = Path(directory)
    low_rank = _low_rank(module, folder, _read_config(folder / CONFIG))
    tensors = _read_weights(folder)
    adapter = {name.removeprefix(_PREFIX): x for name, x in tensors.items()}
    require_fit(target_layers(module, low_rank), adapter, low_rank, f"the adapter in {folder}")
    device = next(module.parameters()).device
    return {name: x.to(device, tree.wide(x)) for name, x in adapter.items()}, low_rank


def _low_rank(module: PreTrainedModel, folder: Path, config: dict[str, Any]) -> Lora:
    """What a config means, where it means no more than a `Lora` can."""
    if missing := [name for name in _NEEDED if config.get(name) is None]:
        raise ValueError(f"{folder / CONFIG} has no {missing[0]}; expected a LoRA that PEFT saved")
    wrong = {name: x for name, x in config.items() if x and name not in _READ | _ASIDE}
    if config.get("bias") == "none":
        del wrong["bias"]
    if config["peft_type"] != "LORA":
        wrong["peft_type"] = config["peft_type"]
    if config.get("init_lora_weights") not in _INITS:
        wrong["init_lora_weights"] = config["init_lora_weights"]
    for name, x in wrong.items():
        raise ValueError(
            f"{folder / CONFIG} sets {name} to {x!r}, which lora does not do; merge the adapter "
            "into its model with PEFT and load that"
        )
    if p := config.get("lora_dropout"):
        warnings.warn(f"{folder}: lora_dropout {p} is left out: no model drops here", stacklevel=3)
    targets = config["target_modules"]
    if isinstance(targets, str):  # PEFT reads a string as a pattern of whole names
        targets = [name for name, _ in module.named_modules() if re.fullmatch(targets, name)]
    scale, alpha = by_root_rank if config.get("use_rslora") else by_rank, config["lora_alpha"]
    alpha = float(alpha) if type(alpha) is int else alpha
    return Lora(config["r"], alpha, tuple(targets), scale)


def _read_config(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise OSError(f"{path} does not exist; expected the folder of an adapter that PEFT saved")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OSError(f"{path} is damaged: {error}; copy it again") from error
    if not isinstance(config, dict):
        raise OSError(f"{path} is damaged: it holds a {type(config).__name__}; copy it again")
    return config


def _read_weights(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.exists():
        pickled = (
            f"; {PICKLE} is a pickle, which is never opened" if (folder / PICKLE).exists() else ""
        )
        raise OSError(f"{path} does not exist{pickled}; save the adapter as safetensors")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise OSError(f"{path} is damaged: {error}; copy it again") from error
