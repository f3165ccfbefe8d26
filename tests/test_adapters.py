"""Adapters as folders: what is written, what PEFT makes of it, and what is refused."""

import json

import pytest
import tiny
import torch
from cases_lora import KEY, ROWS, drawn, tuned
from safetensors.torch import load_file, save_file

from rlhf_fn.adapters import load_adapter, save_adapter
from rlhf_fn.lora import Lora, adapted, all_linear, by_rank, by_root_rank, lora, on_base
from rlhf_fn.models import causal_lm, hidden_states

each_decoder = pytest.mark.parametrize("family", tiny.DECODERS)
each_scale = pytest.mark.parametrize("scale", [by_rank, by_root_rank])
close = torch.testing.assert_close


@pytest.fixture
def saved(tmp_path):
    """(module, adapter, low_rank, folder) of a small adapter of a Llama."""
    module, _, _, _, _ = tuned("llama")
    low_rank = Lora(2, 3.0, ("q_proj", "down_proj"), by_rank)
    adapter = drawn(lora(causal_lm, module, causal_lm(module).params, low_rank, KEY).params)
    save_adapter(module, adapter, low_rank, tmp_path)
    return module, adapter, low_rank, tmp_path


def change(folder, **settings):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@each_decoder
@each_scale
def test_a_saved_adapter_comes_back_to_the_bit(family, scale, tmp_path):
    module, _, low_rank, _, adapter = tuned(family, scale=scale)
    save_adapter(module, adapter, low_rank, tmp_path)
    loaded, found = load_adapter(module, tmp_path)
    close(loaded, adapter, rtol=0, atol=0)
    assert found == low_rank


def test_the_files_have_the_names_shapes_and_settings_of_peft(tmp_path):
    module = tiny.tiny("gpt2")
    low_rank = Lora(2, 3.0, ("attn.c_proj", "c_fc"), by_root_rank)
    adapter = drawn(lora(causal_lm, module, causal_lm(module).params, low_rank, KEY).params)
    save_adapter(module, adapter, low_rank, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        "adapter_model.safetensors", "adapter_config.json",
    }  # fmt: skip
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    layers = "base_model.model.transformer.h"
    assert {name: tuple(x.shape) for name, x in tensors.items()} == {
        f"{layers}.{i}.{name}": shape
        for i in (0, 1)
        for name, shape in {
            "attn.c_proj.lora_A.weight": (2, 16), "attn.c_proj.lora_B.weight": (16, 2),
            "mlp.c_fc.lora_A.weight": (2, 16), "mlp.c_fc.lora_B.weight": (64, 2),
        }.items()
    }  # fmt: skip
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": None, "r": 2,
        "lora_alpha": 3.0, "use_rslora": True, "target_modules": ["attn.c_proj", "c_fc"],
        "fan_in_fan_out": True, "lora_dropout": 0.0, "bias": "none", "inference_mode": True,
    }  # fmt: skip


def test_targets_that_peft_would_find_outside_of_the_backbone_are_saved_in_full(tmp_path):
    module = tiny.tiny("bert")
    low_rank = Lora(2, 3.0, ("dense",), by_rank)
    adapter = lora(hidden_states, module.base_model, hidden_states(module).params, low_rank, KEY)
    named = {f"bert.{name}": x for name, x in drawn(adapter.params).items()}
    save_adapter(module, named, low_rank, tmp_path)
    targets = load_adapter(module, tmp_path)[1].targets
    assert {f"{name}.lora_A.weight" for name in targets} == {n for n in named if "lora_A" in n}
    assert not any(name.startswith("cls") for name in targets)


def test_an_adapter_in_half_precision_is_loaded_in_float32(saved):
    module, adapter, low_rank, folder = saved
    save_adapter(module, {n: x.bfloat16() for n, x in adapter.items()}, low_rank, folder)
    loaded, _ = load_adapter(module, folder)
    close(loaded, {n: x.bfloat16().float() for n, x in adapter.items()}, rtol=0, atol=0)


def test_a_string_of_targets_is_a_pattern_of_whole_names(saved):
    module, adapter, _, folder = saved
    change(folder, target_modules=r".*\.(q|down)_proj")
    loaded, found = load_adapter(module, folder)
    close(loaded, adapter, rtol=0, atol=0)
    assert len(found.targets) == 4 and all(
        name.startswith("model.layers") for name in found.targets
    )
    change(folder, target_modules="q_proj")
    with pytest.raises(ValueError, match="targets is empty"):
        load_adapter(module, folder)


UNSUPPORTED = {
    "use_dora": True, "bias": "lora_only", "lora_bias": True, "modules_to_save": ["lm_head"],
    "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 4}, "layers_to_transform": [0],
    "exclude_modules": ["k_proj"], "layer_replication": [[0, 1]], "init_lora_weights": "pissa",
    "trainable_token_indices": [1], "target_parameters": ["w"], "peft_type": "IA3",
    "use_qalora": True, "a_setting_of_tomorrow": 1,
}  # fmt: skip


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_not_supported_is_refused_by_its_name(saved, name):
    module, _, _, folder = saved
    change(folder, **{name: UNSUPPORTED[name]})
    with pytest.raises(ValueError, match=f"sets {name} to .*, which lora does not do; merge"):
        load_adapter(module, folder)


def test_a_dropout_is_left_out_with_a_warning(saved):
    module, adapter, low_rank, folder = saved
    change(folder, lora_dropout=0.05)
    with pytest.warns(UserWarning, match="lora_dropout 0.05 is left out"):
        assert load_adapter(module, folder)[1] == low_rank


@pytest.mark.parametrize("name", ["peft_type", "r", "lora_alpha", "target_modules"])
def test_a_config_without_what_it_needs_is_refused(saved, name):
    module, _, _, folder = saved
    change(folder, **{name: None})
    with pytest.raises(ValueError, match=f"adapter_config.json has no {name}"):
        load_adapter(module, folder)


def test_alpha_may_be_a_whole_number_and_no_word(saved):
    module, _, low_rank, folder = saved
    change(folder, lora_alpha=3)
    found = load_adapter(module, folder)[1]
    assert found == low_rank and found.scale(found.alpha, found.rank) == 1.5
    change(folder, lora_alpha="3")
    with pytest.raises(TypeError, match="alpha must be a finite number > 0, got '3'|Type-check"):
        load_adapter(module, folder)


@pytest.mark.parametrize("r", [0, -1])
def test_a_rank_that_is_none_is_refused(saved, r):
    module, _, _, folder = saved
    change(folder, r=r)
    with pytest.raises(ValueError, match=f"rank must be at least 1, got {r}"):
        load_adapter(module, folder)


def test_files_that_are_missing_or_damaged_are_named(saved):
    module, _, _, folder = saved
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    whole = weights.read_bytes()
    for part in (b"", whole[:5], whole[:-1], whole[:100]):
        weights.write_bytes(part)
        with pytest.raises(OSError, match="adapter_model.safetensors is damaged"):
            load_adapter(module, folder)
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(OSError, match="adapter_model.bin is a pickle, which is never opened"):
        load_adapter(module, folder)
    for text in ("", "{", "[1]"):
        config.write_text(text)
        with pytest.raises(OSError, match="adapter_config.json is damaged"):
            load_adapter(module, folder)
    config.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(OSError, match="adapter_config.json is damaged"):
        load_adapter(module, folder)
    config.unlink()
    with pytest.raises(OSError, match="adapter_config.json does not exist"):
        load_adapter(module, folder)


def test_an_adapter_of_another_module_or_with_other_tensors_is_refused(saved):
    module, adapter, low_rank, folder = saved
    with pytest.raises(ValueError, match="'q_proj', which is no linear layer .* GPT2LMHeadModel"):
        load_adapter(tiny.tiny("gpt2"), folder)
    with pytest.raises(ValueError, match="adapter does not fit: .*lora_A.weight is None"):
        save_adapter(module, dict(list(adapter.items())[1:]), low_rank, folder)
    weights = folder / "adapter_model.safetensors"
    more = load_file(weights) | {"base_model.model.lm_head.weight": torch.zeros(2)}
    save_file(more, weights)
    with pytest.raises(ValueError, match=r"lm_head.weight is \(2,\), expected None"):
        load_adapter(module, folder)
    with pytest.raises(ValueError, match="is none that PEFT has"):
        save_adapter(module, adapter, low_rank._replace(scale=lambda a, r: a), folder)


@each_decoder
@each_scale
def test_peft_gives_the_same_logits_and_reads_and_writes_the_same_folders(family, scale, tmp_path):
    peft = pytest.importorskip("peft")
    module, base, low_rank, apply, adapter = tuned(family, scale=scale)
    tokens = ROWS[0]
    save_adapter(module, adapter, low_rank, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(tiny.fresh(family), tmp_path / "ours").eval()
    close(theirs(tokens).logits, apply(adapter, tokens, tiny.whole(tokens)))
    config = peft.LoraConfig(
        r=5, lora_alpha=7, target_modules=[*all_linear(module)][:2], task_type="CAUSAL_LM",
        use_rslora=scale is by_root_rank, lora_dropout=0.0,
    )  # fmt: skip
    theirs = peft.get_peft_model(tiny.fresh(family), config).eval()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, p in theirs.named_parameters():
            torch.nn.init.normal_(p, std=0.3) if "lora_" in name else None
    theirs.save_pretrained(tmp_path / "theirs")
    loaded, found = load_adapter(module, tmp_path / "theirs")
    assert found.rank == 5 and found.scale is scale
    ours = on_base(causal_lm(adapted(module, found)).apply, base.params)
    logits = ours(loaded, tokens, tiny.whole(tokens))
    close(theirs(tokens).logits, logits)
    assert not logits.allclose(base.apply(base.params, tokens, tiny.whole(tokens)), atol=1e-2)
