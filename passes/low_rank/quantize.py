"""The pass `quantize`: weights of linear layers, and residuals beside a branch, become codes of a low-bit format. Bounded.

    linear(x, W, b)                      -> gw.lowrank_linear(x, codes, scale, none, none, b, weight_format=...)
    linear(mul(x, a), W, b)              -> the same with smooth=a
    gw.lowrank_linear(x, R, none, D, U)  -> gw.lowrank_linear(x, codes, scale, D, U, ...)

Rounds to nearest. Without calibration the error of a layer is |W - Q(W)| / |W|, with it that of its outputs.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ...ir import Node, Program, Rewriter
from ...ir.errors import PassError
from ...ir.float64 import exact_value
from ...ir.low_bit import Quantized, dequantize, fake_quantize, format_of, quantize
from ..base import LeftAlone, Outcome, Pass
from ..check import Reference
from ..contract import Contract
from ..options import at_least, is_size, is_texts, one_of, option, size_in_bytes
from ..progress import progress_bar
from ..verdict import Verdict
from .calibrate import collect_waves, copied
from .fit import is_static, relative_norm, static_scale
from .formats import ACTIVATIONS, WEIGHTS
from .held import Original, hold
from .layers import find_layers, idle_lines, matches
from .quality import judge_outputs
from .recipe import Recipe, stored_dtype
from .rewrite import LOWRANK, Product, product_of, quantize_product
from .statistics import Statistics


@dataclass(frozen=True)
class Quantize(Pass):
    """Weights of linear layers, and residuals beside a branch, are rounded to codes of a low-bit format.

    weight, act: formats. budget: the largest error of a layer; auto is 1.5 x what the formats make of normal numbers. output_budget:
    of the whole program under verify="numeric". min_numel, skip: smaller weights, and layers of these names, stay. calibration:
    example inputs to measure errors on. max_rows: input rows kept for a layer. max_calib_bytes: of all rows together; more layers than
    fit go in waves, whose number changes the time and no bit of the result."""

    name = "quantize"
    contract = Contract.BOUNDED
    before = frozenset({"slice-groups"})  # layers inside a region are not seen
    after = frozenset({"smooth", "split-low-rank"})

    weight: str = option("int4-g64", f"one of {', '.join(WEIGHTS)}", one_of(WEIGHTS))
    act: str = option("none", f"one of {', '.join(ACTIVATIONS)}", one_of(ACTIVATIONS))
    budget: Any = option("auto", "auto, or a number of at least 0", lambda v: v == "auto" or at_least(0.0)(v))
    output_budget: Any = option(None, "none, or a number of at least 0", lambda v: v is None or at_least(0.0)(v))
    min_numel: int = option(65536, "an integer of at least 0", at_least(0))
    max_rows: int = option(4096, "an integer of at least 8", at_least(8))
    max_calib_bytes: Any = option("2GiB", "a size such as 2GiB", is_size)
    skip: tuple[str, ...] = option((), "a list of patterns", is_texts)
    calibration: Any = option(None, "an iterable of example inputs", lambda v: v is None or isinstance(v, Iterable), spelled=False)

    def __post_init__(self) -> None:
        if self.act is None:  # what a pipeline's text calls none
            object.__setattr__(self, "act", "none")
        super().__post_init__()
        if is_static(self.act) and self.calibration is None:
            raise PassError(f"pass {self.name}: act {self.act} needs example inputs: give calibration=, an iterable of argument tuples")

    def check(self, reference: Reference, after: Program) -> Verdict:
        return judge_outputs(reference, after, self.output_budget)

    def run(self, rewriter: Rewriter) -> Outcome:
        layers, left = find_layers(rewriter)
        nodes = {layer.node for layer in layers}
        found = [product_of(node, rewriter.program) for node in rewriter.nodes() if node in nodes or node.target is LOWRANK]
        products = [product for product in found if product is not None]
        taken = []
        for product in products:
            reason = self._reason_against(product)
            if reason:
                left.append(LeftAlone.at(product.node, f"{product.name}: {reason}"))
            else:
                taken.append(product)
        errors: dict[str, float] = {}
        for product, statistics in self._calibrated(rewriter, taken):
            result = self._quantized(rewriter, product.node, statistics)
            if isinstance(result, str):
                left.append(LeftAlone.at(product.node, f"{product.name}: {result}"))
            else:
                errors[product.name] = result
        lines = [f"{len(errors)} layers in {self.weight}" + ("" if self.act == "none" else f" x {self.act}")]
        if errors:
            worst = max(errors, key=errors.__getitem__)
            lines.append(f"errors {min(errors.values()):.3g} to {errors[worst]:.3g} ({worst}), of at most {self._limit:.3g}")
        if self.calibration is None:
            lines.append("not checked on data: errors are those of the weights")
        lines += idle_lines((product.name for product in products), skip=self.skip)
        return Outcome(tuple(left), tuple(lines), {"errors": errors})

    @property
    def _limit(self) -> float:
        return Recipe(weight=self.weight, act=self.act, budget=self.budget).limit

    def _reason_against(self, product: Product) -> str:
        n, k = product.shape
        if matches(product.name, self.skip):
            return "its name is among those to skip"
        if n * k < self.min_numel:
            return f"its weight has {n * k} elements, fewer than min_numel {self.min_numel}"
        if self.act != "none" and math.prod(product.node.meta["val"].shape[:-1]) == 1:
            return "it has one row in every call, and quantized activations save nothing there"
        for name in (self.weight, *(() if self.act == "none" else (self.act,))):
            if k % format_of(name).group_of(k):
                return f"K = {k} is no multiple of the blocks of {name}"
        return ""

    def _calibrated(self, rewriter: Rewriter, products: list[Product]) -> Iterator[tuple[Product, Statistics | None]]:
        """The products with what their inputs were, wave by wave; what is rewritten meanwhile changes none of it."""
        if self.calibration is None or not products:
            yield from ((product, None) for product in products)
            return
        program, nodes = copied(rewriter)
        by_weight = {str(product.matrix.target): product for product in products}
        with progress_bar() as tell:
            waves = collect_waves(
                program,
                {weight: nodes[product.x] for weight, product in by_weight.items()},
                self.calibration,
                function=rewriter.function.name,
                max_rows=self.max_rows,
                max_bytes=size_in_bytes(self.max_calib_bytes),
                tell=tell,
            )
            yield from ((by_weight[weight], statistics) for wave in waves for weight, statistics in wave.items())

    def _quantized(self, rewriter: Rewriter, node: Node, statistics: Statistics | None) -> str | float:
        """Rewrites the layer and gives its error, or says why not."""
        if statistics is not None and statistics.reason_against_judging:
            return statistics.reason_against_judging
        product = product_of(node, rewriter.program)  # anew: what it reads may have been rewritten
        assert product is not None
        matrix = product.exact_matrix(rewriter.program).to(torch.float32)
        if not bool(torch.isfinite(matrix).all()):
            return "its weight holds NaN or infinity"
        quantized = quantize(matrix, self.weight, stored_dtype(product.dtype))
        measured = _Measured(rewriter.program, product, matrix, quantized, self, statistics)
        if not measured.error <= self._limit:
            return f"its error of {measured.error:.3g} is over the budget of {self._limit:.3g}"
        original = Original.of(measured.original, product.bias, rewriter.program)
        with rewriter.step("quantize"):
            new = quantize_product(rewriter, product, quantized, self.weight, measured.activations, 0)
        rows = None if statistics is None else statistics.selection
        hold(rewriter, product.x, [(new, original)], rows, measured.error, self.act)
        return measured.error


class _Measured:
    """The error of one layer's codes, and the attributes of its activations."""

    def __init__(self, program: Program, product: Product, matrix: torch.Tensor, quantized: Quantized, options: Quantize, seen: Any):
        self.program, self.product, self.options = program, product, options
        self.activations: dict[str, Any] = {} if options.act == "none" else {"act_format": options.act}
        values = dequantize(quantized.codes, quantized.scale, quantized.scale2, options.weight, torch.float32)
        smooth, down, up = (self._value(node) for node in (product.smooth, product.down, product.up))
        whole = matrix if up is None or down is None else matrix + up @ (down if smooth is None else down / smooth)
        self.original = whole if smooth is None else whole * smooth
        if seen is None:
            self.error = relative_norm(matrix - values, whole)
            return
        x = seen.selection.to(torch.float32)
        scaled = x if smooth is None else x * smooth
        scale2 = 1.0
        if is_static(options.act):
            rows = seen.rows.to(torch.float32)
            scale2 = static_scale(rows if smooth is None else rows * smooth, options.act)
            self.activations["act_scale2"] = scale2
        of_model = product.dtype if product.dtype in (torch.float16, torch.bfloat16) else torch.float32
        coded = fake_quantize(scaled, options.act, of_model, scale2)
        self.error = relative_norm(scaled @ matrix.T - coded @ values.T, scaled @ whole.T)

    def _value(self, node: Node | None) -> torch.Tensor | None:
        return None if node is None else exact_value(self.program.weights[str(node.target)]).to(torch.float32)
