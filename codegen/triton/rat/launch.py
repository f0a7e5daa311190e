"""How the kernels are launched: for a step of one token of each row one kernel, and a second where the slots of a row are shared by
several programs; otherwise states, attention, and what the caches keep.

A GPU is not asked for positions, as that would wait for it. A row or position outside of the caches is neither read nor written; results
for it are NaN.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ....ir.ops.rat import rat_attention as attention_by_body
from ....ir.ops.rat import rat_cached_attention as cached_by_body
from ...rat.operands import Caches, Options, bias_strides, dense, hold, is_fit, rotation_strides
from ..attention.launch import Tile, splits_of, tile_of
from ..targets import Target, target_of

_MAX_DEPTH = 256
_SEGMENT = 64  # tokens, or a chunk that has more, that one program runs through
_KEPT = 16  # tokens that one program writes

Operands = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


def rat_attention(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, chunk_bias: Tensor | None, cos: Tensor | None, sin: Tensor | None, **options: Any
) -> Tensor:
    """`gw.rat_attention`, by its body where the kernels have no form for the operands."""
    operands = (q, k, v, gate, chunk_bias, cos, sin)
    if not _has_form(operands, Options(**options)):
        return attention_by_body(*operands, **options)
    return _Call(operands, None, Options(**options)).sequence()


def step_in_place(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    chunk_bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    key_slots: Tensor,
    value_slots: Tensor,
    key_state: Tensor,
    value_state: Tensor,
    position: Tensor,
    rows: Tensor,
    lengths: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`gw.rat_cached_attention` where nobody reads the old caches any more: they are written to, and are the result. By its body where the
    kernels have no form for the operands."""
    operands, held = (q, k, v, gate, chunk_bias, cos, sin), (key_slots, value_slots, key_state, value_state)
    caches = Caches(*held, position, rows, lengths)
    if _has_form(operands, Options(**options)) and hold(caches, q, k, Options(**options)):
        call = _Call(operands, caches, Options(**options))
        return (call.step() if q.size(2) == 1 else call.sequence()), *held
    y, *new = cached_by_body(*operands, *held, position, rows, lengths, **options)
    for cache, value in zip(held, new, strict=True):
        cache.copy_(value)
    return y, *held


def _has_form(operands: Operands, options: Options) -> bool:
    q = operands[0]
    return q.numel() > 0 and q.size(3) <= _MAX_DEPTH and is_fit(*operands, options)


def _tile_of(tokens: int, group: int, depth: int, itemsize: int, target: Target) -> Tile:
    """That of attention over caches, with half as many queries, and in float32 keys: what each query sees takes registers too
    (tests/test_triton_rat_aot.py)."""
    tile = tile_of(tokens, group, depth, depth, itemsize, target)
    is_narrow = itemsize == 4 and tokens > 1
    return replace(tile, q=max(16, tile.q // 2), s=16 if is_narrow else tile.s, num_warps=8 if is_narrow else 4)


class _Call:
    """One call's operands as the kernels take them. What is not there is any tensor, which is not read."""

    def __init__(self, operands: Operands, caches: Caches | None, options: Options):
        q, k, v, gate, bias, cos, sin = operands
        self.q, self.k, self.v = (dense(each) for each in (q, k, v))
        self.gate, self.bias, self.caches, self.options = gate, self.q if bias is None else bias, caches, options
        self.cos, self.sin = (self.q if each is None else dense(each) for each in (cos, sin))
        self.bias_strides = (0, 0, 0) if bias is None else bias_strides(bias)
        self.of_rotations = (0, 0, 0, 0) if cos is None or sin is None else (*rotation_strides(self.cos), *rotation_strides(self.sin))
        self.batch, self.heads, self.tokens, self.depth = q.shape
        self.kv_heads = k.size(1)
        self.streams, self.group = self.batch * self.kv_heads, self.heads // self.kv_heads
        self.turned, self.has_bias = 0 if cos is None else cos.size(2), bias is not None
        # Without caches these stand for what is not read.
        self.slots = [self.q, self.q] if caches is None else [caches.key_slots, caches.value_slots]
        self.states = [self.q, self.q] if caches is None else [caches.key_state, caches.value_state]
        places = [self.q] * 3 if caches is None else [each.contiguous() for each in caches.places]
        self.places = [*places, places[0]][:3]
        self.cache_rows, self.capacity = (0, 0) if caches is None else (caches.key_slots.size(0), caches.key_slots.size(2))
        self.target = target_of(q.device)
        self.tile = _tile_of(self.tokens, self.group, self.depth, q.element_size(), self.target)

    def sequence(self) -> Tensor:
        """Any number of tokens."""
        from . import kernels

        finals = self.tokens // self.options.chunk + 2 if self.options.is_raw else 0
        rows = self.tokens + finals
        near = [self._empty(self.streams, rows, self.depth, dtype=self.q.dtype) for _ in range(2)]
        last = self._empty(self.streams, 2, self.depth, dtype=torch.float32)
        y = self._empty(self.batch, self.tokens, self.heads, self.depth, dtype=self.q.dtype)
        is_cached, segment = self.caches is not None, self.options.chunk * max(1, _SEGMENT // self.options.chunk)
        segments = (self.tokens - 1) // segment + 2 if self.options.reset else 1
        tile, of_states, of_slots = self.tile, self._strides(self.states, 2), self._strides(self.slots, 3)
        with torch.cuda.device_of(self.q):
            kernels.scan[(self.streams, segments)](
                self.k, self.v, self.gate, self.bias, self.cos, self.sin, *self.states, *self.places, *near, last,
                *self.k.stride()[:3], *self.v.stride()[:3], *self.gate.stride(), *self.bias_strides, *self.of_rotations, *of_states,
                self.kv_heads, self.tokens, rows, self.cache_rows,
                **self._turning, CHUNK=self.options.chunk, SEGMENT=segment, IS_RAW=self.options.is_raw, RESETS=self.options.reset,
                HAS_BIAS=self.has_bias, IS_CACHED=is_cached, HAS_LENGTHS=self._has_lengths, BLOCK_D=tile.d, num_warps=1,
            )  # fmt: skip
            kernels.flash[(self.streams, -(-self.tokens * self.group // tile.q))](
                self.q, *near, self.cos, self.sin, *self.slots, *self.places[:2], y,
                *self.q.stride()[:3], *self.of_rotations, *of_slots,
                self.kv_heads, self.tokens, rows, self.cache_rows, self.capacity, self.options.scale, self.options.summary_bias,
                GROUP=self.group, **self._turning, **self._seeing, IS_CACHED=is_cached, **self._blocks, num_warps=tile.num_warps,
            )  # fmt: skip
            if is_cached:
                kernels.keep[(self.streams, -(-self.tokens // _KEPT))](
                    *near, last, *self.slots, *self.states, *self.places, *of_slots, *of_states,
                    self.kv_heads, self.tokens, rows, self.cache_rows, self.capacity,
                    DEPTH=self.depth, **self._seeing, HAS_LENGTHS=self._has_lengths, BLOCK_T=_KEPT, BLOCK_D=tile.d, num_warps=4,
                )  # fmt: skip
        return y.transpose(1, 2)

    def step(self) -> Tensor:
        """One token of each row, with caches."""
        from ..attention import kernels as joining
        from . import kernels

        tile, places = self.tile, self.batch * self.heads
        splits = splits_of(self.streams, self.capacity, tile, self.target)
        y = self._empty(self.batch, 1, self.heads, self.depth, dtype=self.q.dtype)
        sums = y if splits == 1 else self._empty(splits, *y.shape, dtype=torch.float32)
        stats = y if splits == 1 else self._empty(splits, places, 2, dtype=torch.float32)
        cos_row, _, sin_row, _ = self.of_rotations
        gate_row, gate_head, _, gate_channel = self.gate.stride()
        with torch.cuda.device_of(self.q):
            kernels.decode[(self.streams, splits)](
                self.q, self.k, self.v, self.gate, self.bias, self.cos, self.sin, *self.slots, *self.states, *self.places, sums, stats,
                *self.q.stride()[:2], *self.k.stride()[:2], *self.v.stride()[:2], gate_row, gate_head, gate_channel, *self.bias_strides,
                cos_row, sin_row, *self._strides(self.slots, 3), *self._strides(self.states, 2),
                self.kv_heads, self.cache_rows, self.capacity, self.options.scale, self.options.summary_bias,
                GROUP=self.group, **self._turning, **self._seeing, RESETS=self.options.reset, HAS_BIAS=self.has_bias,
                HAS_LENGTHS=self._has_lengths, IS_SPLIT=splits > 1, **self._blocks, num_warps=tile.num_warps,
            )  # fmt: skip
            if splits > 1:
                joining.join[(-(-places // 4),)](sums, stats, y, places, splits, WIDTH=self.depth, BLOCK_N=4, BLOCK_E=tile.e, num_warps=4)
        return y.transpose(1, 2)

    @property
    def _turning(self) -> dict[str, Any]:
        return {"DEPTH": self.depth, "TURNED": self.turned, "INTERLEAVED": self.options.rope_style == "interleaved"}

    @property
    def _seeing(self) -> dict[str, Any]:
        return {"CHUNK": self.options.chunk, "WINDOW": self.options.window, "SINKS": self.options.sinks, "IS_RAW": self.options.is_raw}

    @property
    def _blocks(self) -> dict[str, int]:
        return {"BLOCK_Q": self.tile.q, "BLOCK_S": self.tile.s, "BLOCK_D": self.tile.d}

    @property
    def _has_lengths(self) -> bool:
        return self.caches is not None and self.caches.lengths is not None

    def _strides(self, pair: list[Tensor], dims: int) -> list[int]:
        return [0] * (2 * dims) if self.caches is None else [step for each in pair for step in each.stride()[:dims]]

    def _empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.q.device)
