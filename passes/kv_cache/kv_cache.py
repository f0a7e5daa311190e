"""Makes a decoder's keys and values explicit state, so that each token is computed once.

    main(tokens [B, T], positions)                                 stays as it is
    prefill(tokens [B, T], position, rows, lengths, caches)        -> logits [B, V], new caches
    decode(tokens [B, 1], position, rows, caches)                  -> logits [B, V], new caches
    verify(tokens [B, T], position, rows, caches)                  -> logits [B, T, V], new caches

    attention(q, k, v, causal)  ->  cache = kv_append(cache, k, v, position, rows); cached_attention(q, cache, position, rows)
    rat_attention(q, k, v, ..)  ->  rat_cached_attention(q, k, v, .., caches, states, position, rows, lengths), and no verify

Where attention has a window its caches are rings, which keep the last positions alone.

All functions read one weight table. Source: specs/layer_skip.md, section 3.
"""

from dataclasses import dataclass

from ...ir import Program, Rewriter
from ...ir.errors import PassError
from ...ir.pattern import NoMatch
from ..base import LeftAlone, Outcome, Pass
from ..check import Reference
from ..contract import Contract
from ..experts.capacity import leaks_future
from ..verdict import Verdict
from . import steps
from .agreement import check_agreement, judge_steps
from .cache_sizes import cache_sizes
from .decoder import find_decoder
from .recurrence import Recurrence
from .report import described


@dataclass(frozen=True)
class KVCache(Pass):
    """A captured decoder gets functions `prefill`, `decode` and `verify` over caches of its keys and values; `main` stays.

    Where a layer is a chunked recurrence there is no `verify`: none of a draft's tokens could be taken back.

    Raises:
        PassError: the program is no decoder whose attentions are causal, or tokens meet elsewhere than in its attentions; the
            message says where and why.
    """

    name = "kv-cache"
    rules = ("explicit-caches",)
    contract = Contract.EXACT
    ensures = frozenset({"explicit-caches"})
    after = frozenset(
        {"smooth", "split-low-rank", "quantize", "absorb-outliers", "append-lora", "fold-batch-norm", "fold-constants", "regroup-experts"}
        | {"rat-recurrence"}
    )
    before = frozenset({"slice-groups"})

    def run(self, rewriter: Rewriter) -> Outcome:
        if rewriter.function.name != "main":
            return Outcome()
        program = rewriter.program
        if "decode" in program.functions:
            return Outcome((LeftAlone("main", "its functions of one step are there already"),))
        if leaks_future(program):
            raise PassError("kv-cache: experts of this model choose among all positions, so what a token gets depends on later ones")
        decoder = find_decoder(program, rewriter.function)
        if isinstance(decoder, NoMatch):
            raise PassError(_refusal(decoder))
        sizes = cache_sizes(program.symbols, decoder)
        recurs = any(isinstance(each, Recurrence) for each in decoder.attentions)
        with rewriter.step("explicit-caches"):
            rewriter.add_function(steps.prefill(program, decoder, sizes))
            rewriter.add_function(steps.decode(program, decoder, sizes))
            if not recurs:
                rewriter.add_function(steps.verify(program, decoder, sizes))
        check_agreement(program, decoder)
        left = (LeftAlone("verify", _NO_WAY_BACK),) if recurs else ()
        return Outcome(left, lines=described(program, decoder))

    def check(self, reference: Reference, after: Program) -> Verdict:
        """That of `main`, which stays, and of a prompt in parts: prefill, then token by token."""
        verdict = reference.judge_exact(after)
        return verdict if verdict.kind != "right" else judge_steps(after, reference.inputs, reference.in_float64)


def _refusal(reason: NoMatch) -> str:
    where = str(reason.node.meta.get("where") or "") if reason.node is not None else ""
    return f"kv-cache needs a causal decoder of tokens: {reason.reason}" + (f" (at {where})" if where else "")


_NO_WAY_BACK = "a chunked recurrence forgets what left its window, so that drafted tokens could not be taken back: nothing is drafted here"
