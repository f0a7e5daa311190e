"""Themes: a rule, programs around a site of it or around a near miss, and the pass that has it.

Left to chance, a site and its pass meet in one trial of a thousand for some rules. Source: specs/trust.md, sections 3.6 and 3.7.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ..ir import Program
from ..passes import (
    FoldBatchNorm,
    FoldConstants,
    KVCache,
    Pass,
    RegroupExperts,
    RemoveDeadCode,
    RemoveNoOps,
    RemoveProvenAssertions,
    ShareSubexpressions,
    SliceGroups,
    Smooth,
    SplitLowRank,
)
from .choices import Choices
from .decoders import random_decoder
from .ops import motifs, rule_sites, sizes
from .programs import program_around


@dataclass(frozen=True)
class Theme:
    """`program(choices, max_nodes)` has a site of `rule`, or a near miss, for the pass `wanted` with `options` to find."""

    rule: str  # of the pass
    wanted: Pass
    program: Callable[[Choices, int], Program]
    options: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    weight: int = 3  # how often it is drawn, beside others

    @property
    def name(self) -> str:
        return f"{self.wanted.name}/{self.rule}"


def _around(maker: Callable[..., object], *, dynamic: bool = False) -> Callable[[Choices, int], Program]:
    return partial(_made_around, maker, dynamic)


def _made_around(maker: Callable[..., object], dynamic: bool, choices: Choices, max_nodes: int) -> Program:
    return program_around(choices, maker, max_nodes, dynamic=dynamic)


_TIGHT = {"memory_budget": ("1%", "25%"), "max_slices": (64, 7), "axes": (("rows", "query"),)}

THEMES: tuple[Theme, ...] = (
    Theme("remove-assertion", RemoveProvenAssertions(), _around(sizes.assertion, dynamic=True)),
    Theme("remove-unused", RemoveDeadCode(), _around(rule_sites.unused_call)),
    Theme("remove-no-op", RemoveNoOps(), _around(rule_sites.copy_of_what_a_caller_has)),
    Theme("merge-views", RemoveNoOps(), _around(rule_sites.view_of_a_view), weight=4),
    Theme("merge-permutes", RemoveNoOps(), _around(rule_sites.permutation_of_a_permutation)),
    Theme("share", ShareSubexpressions(), _around(rule_sites.equal_calls)),
    Theme("fold-batch-norm", FoldBatchNorm(), _around(motifs.layer_then_batch_norm)),
    Theme("fold", FoldConstants(), _around(rule_sites.constant_for_a_caller), {"limit": ("16MiB",)}),
    Theme("outline-region", SliceGroups(), _around(rule_sites.narrow_between_wide), _TIGHT),
    Theme("split-group-norm", SliceGroups(), _around(rule_sites.norm_of_a_wide_image), _TIGHT, weight=5),
    Theme("attention-rows", SliceGroups(), _around(rule_sites.long_causal_attention), _TIGHT, weight=5),
    Theme("split-low-rank", SplitLowRank(), _around(rule_sites.large_layer), {"rank": (1, 2, 32)}, weight=4),
    Theme("fold-smoothing", Smooth(calibration=()), _around(rule_sites.layer_behind_what_takes_factors), {"fold": (True,)}),
    Theme("multiply-by-smoothing", Smooth(calibration=()), _around(rule_sites.layer_of_an_activation)),
    Theme("regroup", RegroupExperts(), _around(motifs.mixture_of_experts), weight=4),
    Theme("explicit-caches", KVCache(), random_decoder),
)
"""One for each rule of our exact passes; passes that are not exact are judged in their own tests."""


def drawn_theme(choices: Choices) -> Theme:
    return choices.pick([theme for theme in THEMES for _ in range(theme.weight)])
