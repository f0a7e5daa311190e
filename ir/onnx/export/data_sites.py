"""Sites whose results have sizes that only the data tell.

Behind a node of its own, whose shapes are arguments, torch's exporter knows no size that nothing before it has. `gw_export::site` has a
type of which such sizes come anew whenever it is traced, as torch's own operators have that are alike (nonzero).
"""

from collections.abc import Sequence
from typing import Any

import torch

from ...ops.onnx_node import DTYPES
from ..dialect import DOMAIN

SITE = "Site"
_LIBRARY = torch.library.Library("gw_export", "DEF")
_LIBRARY.define("site(Tensor[] inputs, SymInt[] sizes, int number, ScalarType[] dtypes, int[] ranks) -> Tensor[]")


def _types(inputs: list[torch.Tensor], sizes: list[Any], number: int, dtypes: list[torch.dtype], ranks: list[int]) -> list[torch.Tensor]:
    """`sizes` are those of all results, one after another, -1 where only the data tell."""
    following = iter(sizes)
    results = []
    for dtype, rank in zip(dtypes, ranks, strict=True):
        shape = [next(following) for _ in range(rank)]
        fresh = [torch.library.get_ctx().new_dynamic_size() if isinstance(size, int) and size < 0 else size for size in shape]
        results.append(torch.empty(fresh, dtype=dtype))
    return results


torch.library.register_fake("gw_export::site", _types, lib=_LIBRARY)


def translated(inputs: Sequence[Any], sizes: Sequence[Any], number: int, dtypes: Sequence[Any], ranks: Sequence[int]) -> Any:
    """The ONNX node that a site is until it is put back."""
    import onnx
    from onnxscript import evaluator

    formal = onnx.defs.OpSchema.FormalParameter
    kinds = [f"tensor({onnx.TensorProto.DataType.Name(kind).lower()})" for kind in DTYPES]
    count = len(inputs) + len(ranks)
    parameters = [formal(f"v{place}", f"T{place}") for place in range(count)]
    schema = onnx.defs.OpSchema(
        SITE,
        DOMAIN,
        1,
        inputs=parameters[: len(inputs)],
        outputs=parameters[len(inputs) :],
        type_constraints=[(f"T{place}", kinds, "") for place in range(count)],
        attributes=[onnx.defs.OpSchema.Attribute("number", onnx.defs.OpSchema.AttrType.INT)],
    )
    tracing: Any = evaluator.default()
    made = tracing.eval(schema, list(inputs), {"number": number})
    return made if len(ranks) > 1 else [made]
