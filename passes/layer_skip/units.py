"""What a schedule leaves out: layers, or the branches (attention, MLP) of which they are made."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...ir import Node, Program
from ...ir.errors import PassError
from ...ir.infer import same_type
from ...ir.layers import Layer, find_layers
from ..kv_cache.decoder import Decoder


@dataclass(frozen=True)
class Unit:
    """`result` = `source` + branches, so that `source` times `scale` can stand for it; `attentions` of the decoder, by number, lie
    between."""

    index: int
    source: Node
    result: Node
    attentions: tuple[int, ...]
    where: str
    scale: float = 1.0


def scaled(units: Sequence[Unit], scales: Sequence[float]) -> list[Unit]:
    return [replace(unit, scale=scale) for unit, scale in zip(units, scales, strict=True)]


def find_units(program: Program, decoder: Decoder, unit: str) -> list[Unit]:
    """The layers of a decoder in order, or with unit="sublayer" their branches.

    Raises:
        PassError: attentions share keys, no layers repeat, or one has no identity bypass; it is named.
    """
    _refuse_shared_keys(decoder)
    layers = find_layers(program.main, decoder.tokens).layers
    if not layers:
        raise PassError(
            "layer-skip: no layers repeat: there is no value through which all passes between them, as where a skip connection goes around "
            "several"
        )
    outside = [a for a in decoder.attentions if not any(a.root in layer.nodes for layer in layers)]
    if outside:
        place = str(outside[0].root.meta.get("where") or "")
        raise PassError(f"layer-skip: an attention{f' at {place}' if place else ''} lies in none of the {len(layers)} layers that repeat")
    units: list[Unit] = []
    for layer in layers:
        for source, result in _parts(layer, unit):
            inside = _between(layer, source, result)
            attentions = tuple(n for n, attention in enumerate(decoder.attentions) if attention.root in inside)
            units.append(Unit(len(units), source, result, attentions, _where(layer)))
    return units


def _refuse_shared_keys(decoder: Decoder) -> None:
    """Raises PassError where an attention reads the keys or values of one before: leaving out that one would take them away."""
    owners: dict[Node, Node] = {}
    for attention in decoder.attentions:
        own = {attention.k, attention.v}
        owner = next((owners[each] for each in own if each in owners), None)
        if owner is not None:
            reader, owner_place = (node.meta.get("where") or "an unknown line" for node in (attention.root, owner))
            raise PassError(
                f"layer-skip: the attention at {reader} reads keys and values of the one at {owner_place}: a layer whose keys others share "
                "cannot be left out"
            )
        owners |= dict.fromkeys(own, attention.root)


def _parts(layer: Layer, unit: str) -> list[tuple[Node, Node]]:
    additions = layer.bypass()
    problem = f"layer-skip: layer {layer.index} ({_where(layer)}) has no identity bypass"
    if additions is None or not same_type(layer.source.meta["val"], layer.result.meta["val"]):
        raise PassError(f"{problem}: what it gives is not what it reads and something added, so it cannot be left out")
    if unit == "layer":
        return [(layer.source, layer.result)]
    ends = [*additions[:-1], layer.result]
    parts = list(zip([layer.source, *ends[:-1]], ends, strict=True))
    if any(not same_type(source.meta["val"], result.meta["val"]) for source, result in parts):
        raise PassError(f"{problem} around each of its branches: use unit=layer")
    return parts


def _between(layer: Layer, source: Node, result: Node) -> set[Node]:
    """Of the layer's nodes those from `source` to `result`: what `result` needs and `source` does not."""
    nodes = [layer.source, *layer.nodes]
    return set(nodes[nodes.index(source) + 1 : nodes.index(result) + 1])


def _where(layer: Layer) -> str:
    return str(layer.result.meta.get("where") or f"layer {layer.index}")
