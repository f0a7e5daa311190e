"""Mistakes in the exact passes over layers of weights: smoothing, low-rank branches, and mixtures of experts."""

from functools import partial

from .hunts import Hunt
from .mutant import Mutant

_SEEN = ("float64", "rmse", "types", "verifier", "refusal", "error")
_FOLDED, _MULTIPLIED = "smooth/fold-smoothing", "smooth/multiply-by-smoothing"
_LAYERS = ("motifs.gated_layers", "motifs.low_rank_adapter", "motifs.norm_spelled_out", "norms.layer_norm", "products")


def _smoothing(*ops: str, fold: str = "true") -> Hunt:
    return Hunt(f"smooth{{calibration=[],min_numel=0,fold={fold}}}", ops or _LAYERS, 6)


_BEFORE = _smoothing(
    "motifs.norm_before_layers", "motifs.factor_before_layers", "motifs.modulated_before_layers", "motifs.layer_before_layers"
)
_smooth = partial(Mutant, group="routing", catchers=_SEEN, hunt=_smoothing(fold="false"), rule=_MULTIPLIED)
SMOOTHING = (
    _smooth(
        "weight-is-multiplied-too",
        file="passes/low_rank/smoothing.py",
        old="return exact_value(source) / divisor",
        new="return exact_value(source) * divisor",
    ),
    _smooth(
        "factors-along-outputs",
        file="passes/low_rank/smoothing.py",
        old="divisor = a.unsqueeze(1) if layer.transposed else a",
        new="divisor = a if layer.transposed else a.unsqueeze(1)",
    ),
    _smooth(
        "input-is-divided-too",
        file="passes/low_rank/smoothing.py",
        old="rewriter.insert(aten.mul.Tensor, (layer.x, vector)",
        new="rewriter.insert(aten.div.Tensor, (layer.x, vector)",
    ),
    _smooth(
        "bias-lost-while-smoothing",
        file="passes/low_rank/folds.py",
        group="operands",
        old="        return [layer.x, weight, bias]\n",
        new="        return [layer.x, weight, None]\n",
    ),
    _smooth(
        "producer-is-divided",
        file="passes/low_rank/folds.py",
        old="return exact_value(weight) * factors",
        new="return exact_value(weight) / factors",
        hunt=_BEFORE,
        rule=_FOLDED,
    ),
    _smooth(
        "bias-of-the-producer-stays",
        file="passes/low_rank/folds.py",
        old='for name in ("weight", "bias"):',
        new='for name in ("weight",):',
        hunt=_BEFORE,
        rule=_FOLDED,
    ),
    _smooth(
        "bias-of-rows-stays",
        file="passes/low_rank/folds.py",
        old="return torch.where(is_scale, rows * (1 + bias) - 1, rows * bias)",
        new="return torch.where(is_scale, rows * (1 + bias) - 1, bias)",
        hunt=_BEFORE,
        rule=_FOLDED,
    ),
    _smooth(
        "other-readers-are-forgotten",
        file="passes/low_rank/folds.py",
        group="bookkeeping",
        old='                raise Untraceable("something else reads its input")\n',
        new="                continue\n",
        hunt=_BEFORE,
        rule=_FOLDED,
    ),
)

_split = partial(
    Mutant,
    group="operands",
    file="passes/low_rank/rewrite.py",
    catchers=_SEEN,
    hunt=Hunt(
        "split-low-rank{min_numel=0,rank=1}", ("motifs.gated_layers", "motifs.low_rank_adapter", "motifs.attention_block", "products"), 6
    ),
    rule="split-low-rank/split-low-rank",
)
_body = partial(_split, file="ir/ops/low_rank.py")
BRANCHES = (
    _split("branch-counted-twice", old="return whole - wide_up @ raw", new="return whole + wide_up @ raw"),
    _split("residual-is-the-whole", old="return whole - wide_up @ raw", new="return whole"),
    _split(
        "bias-lost-by-the-split",
        old="(product.x, residual, None, down, raised, product.bias)",
        new="(product.x, residual, None, down, raised, None)",
    ),
    _split(
        "residual-of-half-the-digits",
        group="constants",
        old="exact().to(wide), exact)\n    raised",
        new="exact().bfloat16().to(wide), exact)\n    raised",
        catchers=("rmse",),
    ),
    _split(
        "rows-of-the-next-layer",
        group="slices",
        file="passes/low_rank/split.py",
        old="start += layer.out_features",
        new="start += 0",
        equivalent="the residual is what the branch leaves of the weight, whatever the branch is, so that the layer is the same function",
    ),
    _body("branch-dropped", old="y = y + (raw @ down.to(wide).T) @ up.to(wide).T", new="y = y + 0 * y"),
    _body("bias-dropped-by-the-layer", old="        y = y + bias.to(wide)\n", new="        y = y + 0\n"),
    _body(
        "sums-in-bfloat16",
        group="kernels",
        old="wide = torch.float64 if x.dtype == torch.float64 else torch.float32\n    scale_dtype",
        new="wide = torch.float64 if x.dtype == torch.float64 else torch.bfloat16\n    scale_dtype",
        catchers=("rmse",),
    ),
    _body(
        "branch-reads-what-is-smoothed",
        old="(raw @ down.to(wide).T)",
        new="(xs @ down.to(wide).T)",
        catchers=("running",),
        hunt=Hunt("", ("dialect.lowrank_linear",), 1, question="running"),
        rule="",
    ),
)

_experts = partial(
    Mutant,
    group="routing",
    file="ir/ops/experts.py",
    catchers=_SEEN,
    hunt=Hunt("regroup-experts{verify=false}", ("motifs.mixture_of_experts",), 1),
    rule="regroup-experts/regroup",
)
EXPERTS = (
    _experts("next-expert", old="activation)[chosen, tokens]", new="activation)[(chosen + 1) % experts, tokens]"),
    _experts("weights-of-experts-dropped", old="(y.to(combine_dtype) * weight.to(combine_dtype).unsqueeze(-1))", new="y.to(combine_dtype)"),
    _experts(
        "gate-and-value-swapped", old="ACTIVATIONS[activation](gates) * up", new="ACTIVATIONS[activation](up) * gates", group="operands"
    ),
    _experts(
        "mean-over-experts", old="weight.to(combine_dtype).unsqueeze(-1)).sum(1)", new="weight.to(combine_dtype).unsqueeze(-1)).mean(1)"
    ),
    _experts("down-is-not-turned", old="down.transpose(1, 2))", new="down.transpose(1, 2).flip(1))", group="slices"),
    _experts(
        "index-and-weight-swapped",
        file="passes/experts/regroup_experts.py",
        old="(block.x, *chosen, *matrices)",
        new="(block.x, *reversed(chosen), *matrices)",
    ),
    _experts(
        "weights-turned-along-experts",
        file="passes/experts/regroup_experts.py",
        group="slices",
        old="(weight, 1, 2), before=block.result",
        new="(weight, 0, 1), before=block.result",
    ),
    _experts(
        "activation-is-always-silu",
        file="passes/experts/regroup_experts.py",
        group="constants",
        old='{"activation": block.gated.activation,',
        new='{"activation": "relu",',
    ),
    _experts(
        "network-next-expert",
        old="activation)[chosen, tokens]",
        new="activation)[(chosen + 1) % experts, tokens]",
        hunt=Hunt("regroup-experts{verify=false}", network="moe_dlm"),
    ),
    _experts(
        "experts-of-the-next-rank",
        old="chosen = index.masked_fill(index < 0, experts)",
        new="chosen = index.flip(1).masked_fill(index.flip(1) < 0, experts)",
    ),
)

MUTANTS = (*SMOOTHING, *BRANCHES, *EXPERTS)
