"""Puts `gw.rat_attention` in the place of one attention: its gates, its rotary rows, and, where asked for, a gate on what it gives."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ...ir import Node, Rewriter, Weight
from ...ir.derive import ancestors
from ...ir.infer import same_strides
from .gates import Gates
from .sites import Site, Sites

aten, gw = torch.ops.aten, torch.ops.gw


@dataclass(frozen=True)
class Form:
    """What is the same in all layers: the attributes of the operation, and options of the pass that shape what stands around it."""

    chunk: int
    window: int
    sinks: int
    local: str
    reset: bool
    rope: str
    gate: str
    output_gate: bool

    @property
    def unchanged(self) -> int:
        """Tokens up to which a row is the original's, whatever the gates are: nothing is summarised for it."""
        return self.window + self.chunk + self.sinks if self.local == "raw" else 0


@dataclass
class Emitter:
    """Emits into the function that `rewriter` edits. Rotary rows are made once for all layers that read the same tables."""

    rewriter: Rewriter
    sites: Sites
    form: Form
    _rows: dict[Node, Node] = field(default_factory=dict)
    _known_sizes: dict[int, Any] = field(default_factory=dict)

    def recurrence(self, site: Site, gates: Gates) -> None:
        """Replaces the attention of `site`."""
        form = self.form
        gate = self._gate(site, gates)
        bias = None if gates.chunk_bias is None else self._added(site, "rat.chunk_bias", gates.chunk_bias)
        tables = [None if table is None else self._rotary_rows(table, site) for table in (site.cos, site.sin)]
        options: dict[str, Any] = {"chunk": form.chunk, "scale": site.attention.scale}
        stated = {"window": form.window, "sinks": form.sinks, "local": form.local, "reset": form.reset, "summary_bias": gates.summary_bias}
        options |= {name: value for name, value in stated.items() if value != _DEFAULTS[name]}
        out = self._call(site, gw.rat_attention.default, site.q, site.k, site.v, gate, bias, *tables, **options)
        if form.output_gate:
            out = self._gated(site, out)
        if not same_strides(out.meta["val"], site.root.meta["val"]):
            out = self._call(site, aten.clone.default, out, memory_format=torch.contiguous_format)
        self.rewriter.replace(site.root, out)

    def window(self, site: Site, window: int) -> None:
        """Lets the attention of `site`, a scaled_dot_product_attention, see the `window` tokens before each and itself."""
        root = site.root
        place = self._call(site, aten.arange.default, self._size(site, 1), device=root.meta["val"].device)
        behind = self._call(site, aten.sub.Tensor, self._call(site, aten.unsqueeze.default, place, 1), place)
        near, past = self._call(site, aten.le.Scalar, behind, window), self._call(site, aten.ge.Scalar, behind, 0)
        mask = self._call(site, aten.logical_and.default, past, near)
        self.rewriter.set_arguments(
            root, [*root.args[:3], mask], {name: root.kwargs[name] for name in ("scale", "enable_gqa") if name in root.kwargs}
        )

    # --- gates ---

    def _gate(self, site: Site, gates: Gates) -> Node:
        """Logits [B, Hk, T, E]."""
        _, heads, _, width = site.k.meta["val"].shape
        batch, length = self._sizes(site)
        if self.form.gate == "bias":
            logits = self._added(site, "rat.gate.bias", gates.bias.reshape(1, heads, 1, width))
            return self._call(site, aten.expand.default, logits, [batch, heads, length, width])
        per_head = width if self.form.gate == "channel" else 1
        depth = site.h.meta["val"].size(-1)
        weight = self._added(site, "rat.gate.weight", torch.zeros(heads * per_head, depth))
        logits = self._call(site, aten.linear.default, site.h, weight, self._added(site, "rat.gate.bias", gates.bias))
        split = self._call(site, aten.view.default, logits, [batch, length, heads, per_head])
        logits = self._call(site, aten.transpose.int, split, 1, 2)
        return logits if per_head == width else self._call(site, aten.expand.default, logits, [-1, -1, -1, width])

    def _gated(self, site: Site, out: Node) -> Node:
        """2 sigmoid(z) * out, which is `out` where z is 0."""
        heads, width = out.meta["val"].size(1), out.meta["val"].size(3)
        weight = self._added(site, "rat.output_gate.weight", torch.zeros(heads * width, site.h.meta["val"].size(-1)))
        z = self._call(site, aten.linear.default, site.h, weight)
        batch, length = self._sizes(site)
        z = self._call(site, aten.transpose.int, self._call(site, aten.view.default, z, [batch, length, heads, width]), 1, 2)
        gated = self._call(site, aten.mul.Tensor, out, self._call(site, aten.sigmoid.default, z))
        return self._call(site, aten.mul.Tensor, gated, 2)

    def _added(self, site: Site, name: str, value: torch.Tensor) -> Node:
        like = site.q.meta["val"]
        tensor = value.to(like.device, like.dtype).contiguous()
        return self.rewriter.weight(Weight.of(f"{site.name}.{name}", tensor, "added"))

    # --- rotary rows ---

    def _rotary_rows(self, table: Node, site: Site) -> Node:
        """[B|1, T, dr] of a table that multiplies [B, H, T, dr]: of each token's time, or that of its chunk."""
        if table not in self._rows:
            source = table
            if self.form.rope == "chunk":
                source = self._by_chunk(table, site)
            dims = source.meta["val"].dim()
            if dims == 4:
                source = self._call(site, aten.squeeze.dim, source, 1)
            elif dims == 2:
                source = self._call(site, aten.unsqueeze.default, source, 0)
            self._rows[table] = source
        return self._rows[table]

    def _by_chunk(self, table: Node, site: Site) -> Node:
        """`table` computed of times that are divided by the chunk and rounded down; of a constant one, which has all times, its rows."""
        needed = ancestors([table])
        times = [node for node in needed if node is self.sites.positions] or [n for n in needed if n.target is aten.arange.default]
        if not times:
            dim = table.meta["val"].dim() - 2
            place = self._call(site, aten.arange.default, self._size(site, 1), device=table.meta["val"].device)
            return self._call(site, aten.index_select.default, table, dim, self._divided(site, place))
        copies = {node: self._divided(site, node) for node in times}
        for node in [each for each in self.rewriter.graph.nodes if each in needed and each not in copies]:
            if node.op == "call_function" and any(source in copies for source in node.all_input_nodes):
                args, kwargs = _renamed(node.args, copies), _renamed(node.kwargs, copies)
                copies[node] = self.rewriter.insert(node.target, args, kwargs, before=site.root, origin=node)
        return copies[table]

    def _divided(self, site: Site, times: Node) -> Node:
        return self._call(site, aten.div.Tensor_mode, times, self.form.chunk, rounding_mode="floor")

    # --- calls ---

    def _sizes(self, site: Site) -> tuple[Any, Any]:
        """(B, T), as numbers or nodes."""
        return tuple(self._size(site, dim) for dim in (0, 1))  # type: ignore[return-value]

    def _size(self, site: Site, dim: int) -> Any:
        if dim not in self._known_sizes:
            size = self.sites.tokens.meta["val"].size(dim)
            self._known_sizes[dim] = size if isinstance(size, int) else self._call(site, aten.sym_size.int, self.sites.tokens, dim)
        return self._known_sizes[dim]

    def _call(self, site: Site, target: Any, *args: Any, **kwargs: Any) -> Node:
        return self.rewriter.insert(target, args, kwargs, before=site.root, origin=site.root)


def _renamed(value: Any, copies: Mapping[Node, Node]) -> Any:
    """`value` with the nodes that have copies in their place."""
    if isinstance(value, Node):
        return copies.get(value, value)
    if isinstance(value, tuple | list):
        return type(value)(_renamed(item, copies) for item in value)
    if isinstance(value, Mapping):
        return {name: _renamed(item, copies) for name, item in value.items()}
    return value


_DEFAULTS = {argument.name: argument.default_value for argument in gw.rat_attention.default._schema.arguments}
