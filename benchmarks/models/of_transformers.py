"""Models of `transformers`, a token at a time, with what they keep from one to the next."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models.model import Model, Wrapped

TOKENS = 13
SIZES: dict[str, Any] = {
    "vocab_size": TOKENS,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def made(kind: str, **config: Any) -> nn.Module:
    """A language model of the library, with random weights."""
    import transformers

    settings = getattr(transformers, f"{kind}Config")(**config)
    return getattr(transformers, f"{kind}ForCausalLM" if kind != "GPT2" else "GPT2LMHeadModel")(
        settings
    )


def gpt2() -> nn.Module:
    dropouts = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    return made(
        "GPT2", vocab_size=TOKENS, n_embd=16, n_layer=2, n_head=2, n_positions=64, **dropouts
    )


def mistral() -> nn.Module:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return made("Mistral", intermediate_size=24, sliding_window=4, pad_token_id=0, **heads, **SIZES)


class WithCache(Wrapped):
    """The library's own cache object is the state."""

    def forward(self, token: Tensor, cache: Any) -> Any:
        result = self.inner(token[:, None], past_key_values=cache, use_cache=True)
        return result.logits[:, 0], result.past_key_values


class CacheInTuples(Wrapped):
    def forward(self, token: Tensor, state: Any) -> Any:
        cache = transformers().DynamicCache(state or ())
        result = self.inner(token[:, None], past_key_values=cache, use_cache=True)
        state = [(layer.keys, layer.values) for layer in result.past_key_values.layers]
        return result.logits[:, 0], state


class WithMambaCache(Wrapped):
    def forward(self, token: Tensor, cache: Any) -> Any:
        result = self.inner(token[:, None], cache_params=cache, use_cache=True)
        return result.logits[:, 0], result.cache_params


class WithRwkvState(Wrapped):
    def forward(self, token: Tensor, state: Any) -> Any:
        result = self.inner(token[:, None], state=state, use_cache=True)
        return result.logits[:, 0], result.state


def transformers() -> Any:
    """The library."""
    import transformers

    return transformers


LANGUAGE: dict[str, Any] = {
    "library": "transformers",
    "tokens": TOKENS,
    "per_step": True,
    "dtype": torch.float32,
    "tolerance": 1e-3,
}

MODELS = [
    Model(
        name="GPT-2 with its DynamicCache",
        make=lambda: WithCache(gpt2()),
        plain=lambda: CacheInTuples(gpt2()),
        **LANGUAGE,
    ),
    Model(
        name="GPT-2, the cache as tuples",
        make=lambda: CacheInTuples(gpt2()),
        **LANGUAGE,
        note="a budget is not looked at: the state grows",
    ),
    Model(
        name="Mistral, sliding window, with its DynamicCache",
        make=lambda: WithCache(mistral()),
        plain=lambda: CacheInTuples(mistral()),
        **LANGUAGE,
    ),
    Model(
        name="Mamba with its cache",
        make=lambda: WithMambaCache(made("Mamba", state_size=4, **SIZES)),
        **LANGUAGE,
    ),
    Model(
        name="RWKV with its state",
        make=lambda: WithRwkvState(made("Rwkv", context_length=64, **SIZES)),
        **LANGUAGE,
    ),
]
