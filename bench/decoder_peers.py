"""A Llama with random weights and those that generate with it: transformers with two kinds of caches, and onnxruntime; for
`bench/layer_skip.py`.

Each contestant takes prompts [B, P] and gives the new tokens [B, n] that are most likely, one after the other.
"""

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 32000
HEAD_DIM = 64
Generate = Callable[[Tensor, int], list[list[int]]]


def llama(hidden: int, layers: int, dtype: torch.dtype) -> Any:
    """4 heads of keys, a head for 64 of `hidden`, tied embeddings of 32000 tokens; no token ends a text. hidden 768 with 12 layers has
    100M parameters."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=hidden // HEAD_DIM, num_key_value_heads=4,
        intermediate_size=-(-hidden * 8 // 384) * 128, vocab_size=VOCABULARY, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1,
        eos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval().to(dtype)


def transformers_generate(model: Any, cache: str) -> Generate:
    """`cache` is "static" or "dynamic". What it runs is eager: on a CPU transformers compiles nothing unless told to."""

    def generate(prompts: Tensor, count: int) -> list[list[int]]:
        tokens = model.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=count, do_sample=False, disable_compile=True,
            cache_implementation=cache,
        )  # fmt: skip
        return tokens[:, prompts.shape[1] :].tolist()

    return generate


class WithPast(nn.Module):
    """A Llama of transformers over keys and values of the past, as its exporters to ONNX lay it out: each layer's are inputs
    [B, heads, P, D], and outputs with the new ones appended. Logits [B, V] are those of the last token.

    Queries that share a head of keys are multiplied by it together, so that keys are never repeated.
    """

    def __init__(self, model: Any):
        super().__init__()
        self.body, self.head, self.rope_base = model.model, model.lm_head, float(model.config.rope_parameters["rope_theta"])

    def forward(self, tokens: Tensor, past: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        before, new = past[0].shape[2], tokens.shape[1]
        places = torch.arange(before, before + new)
        seen = torch.arange(before + new) <= places.unsqueeze(1)  # [T, P + T]
        angles = places.unsqueeze(1).float() * self.rope_base ** -(torch.arange(0, HEAD_DIM, 2).float() / HEAD_DIM)
        cos, sin = (torch.cat([each, each], -1).to(past[0].dtype) for each in (angles.cos(), angles.sin()))
        x, present = self.body.embed_tokens(tokens), []
        for number, layer in enumerate(self.body.layers):
            attended, *kept = _attention(layer.self_attn, layer.input_layernorm(x), past[2 * number : 2 * number + 2], cos, sin, seen)
            x = x + attended
            x = x + layer.mlp(layer.post_attention_layernorm(x))
            present += kept
        return self.head(self.body.norm(x[:, -1])), present


def _attention(part: Any, x: Tensor, past: list[Tensor], cos: Tensor, sin: Tensor, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (project(x).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for project in (part.q_proj, part.k_proj, part.v_proj))
    keys, values = torch.cat([past[0], _rotated(k, cos, sin)], 2), torch.cat([past[1], v], 2)
    q = _rotated(q, cos, sin).unflatten(1, (keys.shape[1], -1))  # [B, Hkv, G, T, D]
    scores = q.flatten(2, 3) @ keys.transpose(2, 3) * HEAD_DIM**-0.5
    shares = F.softmax(scores.unflatten(2, q.shape[2:4]).masked_fill(~seen, -torch.inf), -1)
    attended = (shares.flatten(2, 3) @ values).unflatten(2, q.shape[2:4]).flatten(1, 2)
    return part.o_proj(attended.transpose(1, 2).flatten(2)), keys, values


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def onnxruntime_generate(model: Any, threads: int) -> Generate:
    """The caches are bound from one step to the next and never leave onnxruntime; it reads the file's weights at once."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "decoder.onnx"
        _export(model, path)
        session = _session(path, threads)
    names, outputs = [each.name for each in session.get_inputs()], [each.name for each in session.get_outputs()]
    heads, dtype = model.config.num_key_value_heads, model.dtype

    def generate(prompts: Tensor, count: int) -> list[list[int]]:
        import onnxruntime

        empty = torch.zeros(len(prompts), heads, 0, HEAD_DIM, dtype=dtype).numpy()
        past = [onnxruntime.OrtValue.ortvalue_from_numpy(empty) for _ in names[1:]]
        tokens, found = prompts.numpy(), []
        for _ in range(count):
            binding = session.io_binding()
            binding.bind_cpu_input(names[0], tokens)
            for name, value in zip(names[1:], past, strict=True):
                binding.bind_ortvalue_input(name, value)
            for name in outputs:
                binding.bind_output(name, "cpu")
            session.run_with_iobinding(binding)
            logits, *past = binding.get_outputs()
            tokens = logits.numpy().argmax(-1)[:, None]
            found.append(tokens)
        return np.concatenate(found, 1).tolist()

    return generate


def _export(model: Any, path: Path) -> None:
    """Any batch, any number of tokens, any past."""
    heads, layers = model.config.num_key_value_heads, model.config.num_hidden_layers
    past = [torch.zeros(2, heads, 5, HEAD_DIM, dtype=model.dtype) for _ in range(2 * layers)]
    batch, new, before = torch.export.Dim("batch"), torch.export.Dim("new"), torch.export.Dim("before")
    shapes = ({0: batch, 1: new}, [{0: batch, 2: before}] * len(past))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter has many
        exported = torch.export.export(WithPast(model), (torch.zeros(2, 3, dtype=torch.int64), past), dynamic_shapes=shapes)
        torch.onnx.export(exported, (), path, dynamo=True, verbose=False, external_data=True)


def _session(path: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")  # else its threads take the cores from whoever is next
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
