"""R9-R12: normalisations. A normalised dim is `reduced`; the others move alone.

Group norm over a sliced dim is exact in two phases: `gw.norm_stats` makes one partial a slice, `gw.norm_apply` folds them (3.4).
"""

from .call import Call, Key
from .table import Moves, Refusal, Row, Tag, declare, row


@row("aten::layer_norm", "aten::rms_norm")
def layer_norm(call: Call, output: int, dim: int) -> Moves | Refusal:
    """d < rank - len(normalized_shape) <- x d."""
    if dim < len(call.out_shape()) - len(call.integers("normalized_shape")):
        return Moves({"input": dim})
    return Refusal("reduced", f"{call.op} normalises over dim {dim}", call.operand("input"))


@row("aten::group_norm", "aten::instance_norm")
def group_norm(call: Call, output: int, dim: int) -> Moves | Refusal:
    """0 <- x 0."""
    if call["use_input_stats"] is False:
        return Refusal("mixed", f"{call.op} with running statistics", call.operand("input"))
    if dim == 0 and call.operand("running_mean") is None:
        return Moves({"input": 0})
    if dim == 0:
        return Refusal("mutates", f"{call.op} updates its running statistics", call.operand("running_mean"))
    split = "; norm_stats and norm_apply split it" if dim > 1 else ""
    return Refusal("reduced", f"{call.op} normalises over dim {dim}{split}", call.operand("input"))


@row("aten::batch_norm", "aten::_native_batch_norm_legit_no_training")
def batch_norm(call: Call, output: int, dim: int) -> Moves | Refusal:
    """Of given statistics:   d != 1 <- x d;   1 <- x 1 and every parameter's 0 [features]."""
    if call["training"]:
        return Refusal("mixed", f"{call.op} takes statistics over the batch", call.operand("input"))
    if output > 0:
        return Refusal("mixed", f"{call.op}: statistics, which are empty in evaluation", call.operand("input"))
    if dim != 1:
        return Moves({"input": dim})
    return Moves({"input": 1, **{key: 0 for key in call.operands if key != "input"}}, "features")


def norm_stats(call: Call, output: int, dim: int) -> Moves | Refusal:
    """stats[1, B, G, 3]:   1 <- x 0."""
    if dim == 1:
        return Moves({"x": 0})
    if dim == 0:
        return Refusal("mixed", "a partial of norm_stats is one a slice; go forward from the sliced dim of x", call.operand("x"))
    return Refusal("mixed", f"dim {dim} of statistics", call.operand("x"))


class NormStats(Row):
    """The one row whose output is not N*m long: over a sliced dim of x other than batch and channel, one partial a slice on dim 0."""

    def forward(self, call: Call, keys: list[Key], output: int, tag: Tag, units) -> Tag | Refusal:
        if tag.dim == 0:
            return Tag(1, tag.unit)
        if tag.dim == 1:
            return Refusal("reduced", "norm_stats gathers groups of channels", call.operand("x"))
        return Tag(0, 0)


declare("gw::norm_stats", NormStats(norm_stats))


@row("gw::norm_apply")
def norm_apply(call: Call, output: int, dim: int) -> Moves | Refusal:
    """d != 1 <- x d;   0 also <- stats 1."""
    if dim == 1:
        return Refusal("mixed", "norm_apply takes groups of channels", call.operand("x"))
    return Moves({"x": 0, "stats": 1} if dim == 0 else {"x": dim})
