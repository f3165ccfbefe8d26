"""A policy as commands hold it."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_fn import loading
from rlhf_fn.folders import saved_dtype
from rlhf_fn.loading import load_policy, load_tokenizer, on, without_weights
from rlhf_fn.models import causal_lm, load_causal_lm, save_policy


def test_a_policy_without_weights_computes_with_those_that_it_is_given(small):
    policy = load_policy(str(small / "model"))
    model, bare = causal_lm(policy.module), without_weights(policy).module
    assert all(p.is_meta for p in bare.parameters())
    tokens = torch.tensor([[5, 6, 7]])
    given = model.params, tokens, tokens > 0
    assert torch.equal(causal_lm(bare).apply(*given), model.apply(*given))


def test_of_what_will_be_in_slices_only_the_buffers_are_moved(small):
    module = on(load_causal_lm(small / "model"), torch.device("meta"), sliced=True)
    assert {x.device.type for x in module.parameters()} == {"cpu"}
    assert {x.device.type for x in module.buffers()} == {"meta"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_will_be_in_slices_is_read_as_it_was_saved(small, tmp_path, dtype):
    load_causal_lm(small / "model").to(dtype).save_pretrained(tmp_path)
    load_tokenizer(str(small / "model")).save_pretrained(tmp_path)
    assert saved_dtype(tmp_path) == dtype
    cut, uncut = (load_policy(str(tmp_path), sliced=each).module for each in (True, False))
    for one, other in zip(cut.parameters(), uncut.parameters(), strict=True):
        assert one.dtype == dtype and other.dtype == torch.float32
        assert torch.equal(one.float(), other)


def test_of_several_dtypes_none_is_narrowed(small, tmp_path):
    module = load_causal_lm(small / "model")
    next(module.parameters()).data = next(module.parameters()).bfloat16()
    module.save_pretrained(tmp_path)
    assert saved_dtype(tmp_path) == torch.float32
    assert saved_dtype(tmp_path / "nothing") == torch.float32


def test_a_buffer_that_half_precision_would_narrow_is_not(small, tmp_path, monkeypatch):
    load_causal_lm(small / "model").bfloat16().save_pretrained(tmp_path)
    load_tokenizer(str(small / "model")).save_pretrained(tmp_path)

    def buffered(path, *, dtype=torch.float32):
        module = load_causal_lm(path, dtype=dtype)
        module.register_buffer("table", torch.ones(3, dtype=dtype))
        return module

    monkeypatch.setattr(loading, "load_causal_lm", buffered)
    module = load_policy(str(tmp_path), sliced=True).module
    assert {x.dtype for x in (*module.parameters(), module.table)} == {torch.float32}


def test_damaged_weights_to_be_cut_are_refused_as_others_are(small, tmp_path):
    load_causal_lm(small / "model").bfloat16().save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-10])
    for sliced in (True, False):
        with pytest.raises(OSError, match="safetensors are damaged"):
            load_policy(str(tmp_path), sliced=sliced)


def test_what_was_trained_of_a_model_in_half_precision_is_saved_as_wide_as_it_is(small, tmp_path):
    module = load_causal_lm(small / "model", dtype=torch.bfloat16)
    params = {name: p.float() + 2**-12 for name, p in causal_lm(module).params.items()}
    save_policy(module, params, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)  # in what its config says
    for name, p in causal_lm(loaded).params.items():
        assert p.dtype == torch.float32 and torch.equal(p, params[name])
    assert module.dtype == torch.bfloat16
