"""What the report says of quantized sites: formats, bits, errors, and where each site's factors went."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from ...ir.liveness import format_bytes
from .choose import Choice
from .fit import Fit
from .folds import Fold
from .recipe import Recipe
from .sites import Site


@dataclass(frozen=True)
class SiteReport:
    """One site: its layers, its setting in words, its error beside that of plain rounding (of the weights before any smoothing) and its
    budget, and bytes of weights."""

    layers: tuple[str, ...]
    weight: str
    act: str
    setting: str
    error: float
    plain_error: float
    budget: float
    bits: float
    bytes_before: int
    bytes_after: int
    factors: str
    candidates: tuple[tuple[str, float], ...]
    note: str

    @staticmethod
    def of(site: Site, recipe: Recipe, choice: Choice, fitted: Fit, fold: Fold | str) -> "SiteReport":
        rank = fitted.setting.rank
        after = sum(_nbytes(each) for each in (*fitted.quantized, *fitted.branches))
        n, k = sum(layer.out_features for layer in site.layers), site.in_features
        if fitted.setting.smooth is None:
            factors = ""
        elif fitted.setting.folded and isinstance(fold, Fold):
            factors = f"folded into {fold.producer}"
        else:
            factors = f"multiplied in: {fold}" if isinstance(fold, str) else "multiplied in"
        return SiteReport(
            layers=tuple(layer.name for layer in site.layers),
            weight=recipe.weight,
            act=fitted.setting.act,
            setting=str(fitted.setting),
            error=fitted.error,
            plain_error=choice.plain_error,
            budget=recipe.limit,
            bits=8 * after / (n * k),
            bytes_before=n * k * site.layers[0].weight.meta["val"].dtype.itemsize,
            bytes_after=after,
            factors=factors,
            candidates=choice.errors,
            note=choice.note if rank < recipe.rank else "",
        )

    @property
    def data(self) -> dict[str, object]:
        return asdict(self)

    def __str__(self) -> str:
        formats = self.weight if self.act == "none" else f"{self.weight} x {self.act}"
        text = f"{', '.join(self.layers)}: {formats}, {self.setting}: error {self.error:.3g} (plain {self.plain_error:.3g}, "
        text += f"budget {self.budget:.3g}), {self.bits:.2f} bits a weight"
        return "; ".join(part for part in (text, self.factors, self.note) if part)


def summary(reports: Sequence[SiteReport], *, checked: bool) -> list[str]:
    """Lines for the report: the whole, then each site."""
    if not reports:
        return ["no site was quantized"]
    before, after = sum(r.bytes_before for r in reports), sum(r.bytes_after for r in reports)
    settings = Counter(r.setting for r in reports).most_common()
    layers = sum(len(r.layers) for r in reports)
    where = f"{_counted(layers, 'layer')} at {_counted(len(reports), 'site')}"
    head = f"{where}: weights of {format_bytes(before)} -> {format_bytes(after)} ({after / before:.3f}); "
    head += ", ".join(f"{count} x {setting}" for setting, count in settings)
    lines = [head] if checked else [head, "not checked on data: errors are those of the weights"]
    return [*lines, *map(str, reports)]


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _nbytes(value: object) -> int:
    """Bytes of codes and scales, or of the factors of a branch."""
    if value is None:
        return 0
    tensors = value if isinstance(value, tuple) else (value.codes, value.scale, value.scale2)  # type: ignore[attr-defined]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
