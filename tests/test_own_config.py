"""Hugging Face decoders after pruning and merging: class, configuration, their own files, generation with its cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import vfx
from vfx.errors import ConfigNote

transformers = pytest.importorskip("transformers")

IDS = torch.randint(50, (16, 12), generator=torch.Generator().manual_seed(0))
X, DATA = {"input_ids": IDS[:2]}, [{"input_ids": IDS}]
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}


def _llama(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES, num_hidden_layers=2, vocab_size=50, pad_token_id=0)
    ).eval()


def _sizes(model: Any) -> dict[str, int]:
    return {name: getattr(model.config, name) for name in (*SIZES, "head_dim")}


@torch.no_grad()
def _generates(model: Any) -> None:
    """With the cache of keys and values the same as without."""
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(IDS[:2], **options)
    assert torch.equal(cached, model.generate(IDS[:2], use_cache=False, **options))
    assert cached.shape == (2, 18)


def test_a_decoder_with_fewer_heads_says_so_in_its_configuration(tmp_path: Path) -> None:
    model = _llama()
    small = vfx.prune_structured(model, X, sparsity=0.5, data=DATA, units="blocks", normalize=None).module
    assert type(small) is type(model)
    halves = {name: size // 2 for name, size in SIZES.items()}
    assert _sizes(small) == {**halves, "head_dim": 8}  # half of the heads, each as wide as before
    assert _sizes(model) == {**SIZES, "head_dim": 8}  # the user's own is left alone
    _generates(small)
    small.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(model)
    torch.testing.assert_close(again(IDS).logits, small(IDS).logits, rtol=0, atol=1e-6)
    _generates(again)


def test_the_configuration_comes_back_from_a_directory(tmp_path: Path) -> None:
    result = vfx.prune_structured(_llama(), X, sparsity=0.5, data=DATA, units="blocks", normalize=None)
    vfx.save_pretrained(result, tmp_path)
    again = vfx.from_pretrained(tmp_path, model=_llama)
    assert _sizes(again) == _sizes(result.module)
    _generates(again)


def test_what_a_configuration_cannot_say_is_noted() -> None:
    """GPT-2's heads share the stream's width, which stays: narrower ones are in no configuration."""
    config = transformers.GPT2Config(n_embd=32, n_head=4, n_layer=2, vocab_size=50, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(config).eval()
    options = {"sparsity": 0.5, "normalize": None, "protect": ["transformer.wte.weight"]}
    with pytest.warns(ConfigNote, match=r"GPT2LMHeadModel cannot say .* use vfx.save_pretrained"):
        small = vfx.prune_structured(model, X, data=DATA, **options).module
    assert type(small) is type(model)
    assert (small.config.n_embd, small.config.n_head, small.config.n_inner) == (32, 4, None)  # none is half right
    assert small.num_parameters() < 0.8 * model.num_parameters()
    _generates(small)


def test_a_merged_decoder_is_one(tmp_path: Path) -> None:
    merged = vfx.merge([_llama(), _llama(1)], X, data=DATA, solve=None).module
    assert type(merged) is type(_llama())
    _generates(merged)
    merged.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(IDS).logits, merged(IDS).logits)
