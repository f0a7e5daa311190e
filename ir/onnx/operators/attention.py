"""Attention and rotary embeddings. What `scaled_dot_product_attention` is not is read by the body that the standard gives."""

from typing import Any

import torch

from ..builder import Unsupported, Value, aten
from ..registry import Call, reader
from ..sizes import Size


@reader("Attention")
def attention(
    call: Call, q: Value, k: Value, v: Value, mask: Value = None, past_k: Value = None, past_v: Value = None, lengths: Value = None
) -> Any:
    """softmax(q k^T scale + mask) v, heads taken apart where they lie in one dim, keys and values behind those of the past."""
    builder = call.builder
    others = [call.get(name, 0) for name in ("softcap", "softmax_precision", "qk_matmul_output_mode")]
    windows = [call.get(name, -1) != -1 for name in ("left_window_size", "right_window_size")]
    if any(others) or any(windows) or lengths is not None or call.wants(3):
        raise Unsupported("it caps scores, returns them, or has a window or lengths")
    flat = builder.rank(q) == 3
    if flat:
        q = _heads(call, q, call.get("q_num_heads"))
        k, v = (_heads(call, each, call.get("kv_num_heads")) for each in (k, v))
    if past_k is not None:
        k, v = builder.cat([past_k, k], 2), builder.cat([past_v, v], 2)
    causal = bool(call.get("is_causal", 0))
    if causal and (mask is not None or past_k is not None):
        raise Unsupported("it is causal over a past or beside a mask")
    q_heads, k_heads = builder.shape(q)[1], builder.shape(k)[1]
    grouped = not (isinstance(q_heads, int) and q_heads == k_heads)
    options: dict[str, Any] = {} if call.get("scale") is None else {"scale": call.get("scale")}
    if grouped:
        options["enable_gqa"] = True
    if mask is not None and _is_short(builder.shape(mask)[-1], builder.shape(k)[2]):
        raise Unsupported("its mask is shorter than the keys")
    if mask is not None and builder.dtype(mask) == torch.bool:
        raise Unsupported("rows of a boolean mask may be empty, which torch makes zeros of")
    # Runtimes of CPUs compute halves in float32: torch's own sums of halves are off by more than the standard's tests allow.
    dtype = builder.dtype(q)
    half = dtype == torch.float16
    operands = [each if each is None or not half else builder.cast(each, torch.float32) for each in (q, k, v, mask)]
    result = builder.call(aten.scaled_dot_product_attention.default, *operands, 0.0, causal, **options)
    result = builder.cast(result, dtype)
    if flat:
        batch, _, length, _ = builder.shape(result)
        result = builder.reshape(builder.permute(result, [0, 2, 1, 3]), [batch, length, -1])
    return result, k, v


def _heads(call: Call, x: Value, count: int) -> Value:
    batch, length, _ = call.builder.shape(x)
    return call.builder.permute(call.builder.reshape(x, [batch, length, count, -1]), [0, 2, 1, 3])


def _is_short(mask: Any, keys: Any) -> bool:
    return not isinstance(mask, Size) and not isinstance(keys, Size) and mask not in (1, keys)
