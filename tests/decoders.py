"""Language models at toy size with random weights, by family: name -> a factory of a module. `LAYERS` each in those whose layers tests
leave out or tell apart, `DEEPER`; two in the others."""

import functools
from collections.abc import Callable
from typing import Any

import torch

import graphwright as gw
from graphwright.ir.decoder_example import decoder_example

LAYERS = 3
VOCABULARY = 64
DEEPER = ("llama", "gemma2", "gemma3", "mistral", "phi", "gpt2")
_TEXT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": VOCABULARY,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def _transformers(model: str, config: str, **settings: Any) -> torch.nn.Module:
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(transformers, model)(getattr(transformers, config)(**settings)).eval()


def _llama_like(architecture: str, config: str = "", **settings: Any) -> Callable[[], torch.nn.Module]:
    return lambda: _transformers(f"{architecture}ForCausalLM", config or f"{architecture}Config", **(_TEXT | settings))


def _zoo() -> torch.nn.Module:
    from graphwright import models

    return models.load("decoder", "tiny")[0]


def _gpt2() -> torch.nn.Module:
    sizes = {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 64}
    return _transformers("GPT2LMHeadModel", "GPT2Config", bos_token_id=1, eos_token_id=2, **sizes)


def _opt() -> torch.nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48, "word_embed_proj_dim": 32}
    return _transformers("OPTForCausalLM", "OPTConfig", vocab_size=VOCABULARY, max_position_embeddings=64, **sizes)


def _gptj() -> torch.nn.Module:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "vocab_size": VOCABULARY, "n_positions": 64}
    return _transformers("GPTJForCausalLM", "GPTJConfig", bos_token_id=1, eos_token_id=2, **sizes)


FAMILIES: dict[str, Callable[[], torch.nn.Module]] = {
    "zoo": _zoo,
    "llama": _llama_like("Llama", num_hidden_layers=LAYERS),
    "qwen3": _llama_like("Qwen3", head_dim=8),
    "gemma": _llama_like("Gemma", head_dim=8),
    "gemma2": _llama_like("Gemma2", num_hidden_layers=LAYERS, head_dim=8, sliding_window=4),
    "gemma3": _llama_like("Gemma3", "Gemma3TextConfig", num_hidden_layers=LAYERS, head_dim=8, sliding_window=4),
    "mistral": _llama_like("Mistral", num_hidden_layers=LAYERS, sliding_window=4),
    "mixtral": _llama_like("Mixtral", num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "olmo2": _llama_like("Olmo2"),
    "phi": _llama_like("Phi", num_hidden_layers=LAYERS),
    "gpt_neox": _llama_like("GPTNeoX"),
    "gpt2": _gpt2,
    "gptj": _gptj,
    "opt": _opt,
}


@functools.cache
def captured(family: str, dtype: torch.dtype = torch.float32) -> gw.Program:
    """The whole forward, captured as `compile_decoder` does. Programs are never written to, so that tests share what takes seconds."""
    module = FAMILIES[family]().to(dtype)
    example = decoder_example(module)
    return gw.capture(module, (), example.kwargs, dynamic_shapes=example.dynamic_shapes)


@functools.cache
def compiled(family: str, dtype: torch.dtype = torch.float32) -> gw.CompiledModel:
    """A decoder over caches, and no other passes."""
    return gw.compile_decoder(FAMILIES[family]().to(dtype), backend="aten", cache=False)
