"""From the arguments of `generate` to its result: checks them, allocates the caches, and runs the scheduler."""

from collections.abc import Iterator
from typing import Any

from ...ir.errors import InputError
from .caches import Caches
from .dispatch import Dispatch
from .generated import Figures, Generated, Token
from .options import check_flags, check_positions, checked_limits, checked_prompts, checked_sampler
from .plain import PlainDecoding
from .rows import Row
from .schedule import Schedule, choose_schedule
from .scheduler import Decoding, Scheduler
from .speculative import SpeculativeDecoding
from .steps import Decoder


def generate(
    decoder: Decoder,
    prompts: Any,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos: Any = None,
    stream: bool = False,
    chunk: int | None = None,
    capacity: int | None = None,
    batch: int | None = None,
    speculative: bool | None = None,
) -> Generated | Iterator[Token]:
    """`CompiledModel.generate`, which says what the arguments mean, for any decoder."""
    check_flags(stream, speculative)
    sampler = checked_sampler(temperature, top_k, top_p, seed)
    checked = checked_prompts(prompts, decoder.vocabulary)
    limits = checked_limits(checked, max_new_tokens, chunk, capacity, batch, eos, decoder.vocabulary, decoder.max_positions)
    schedule = choose_schedule(decoder.schedules, speculative)
    _check_functions(decoder, schedule)
    # A burst may write as many slots behind a row's last one as it drafts.
    check_positions(checked, max_new_tokens, schedule.gamma, decoder.max_positions)
    rows = [Row(number, prompt, max_new_tokens) for number, prompt in enumerate(checked)]
    figures = Figures()
    if not rows or max_new_tokens == 0:
        return iter(()) if stream else Generated([[] for _ in rows], ["length"] * len(rows), [[] for _ in rows], figures)
    dispatch = Dispatch(Caches(decoder.cache_types, limits.batch, limits.capacity + schedule.gamma), decoder.device)
    make = SpeculativeDecoding if schedule.is_speculative else PlainDecoding
    decoding: Decoding = make(decoder, schedule, dispatch, sampler, figures)
    tokens = Scheduler(rows, decoder["prefill"], decoding, dispatch, sampler, limits, figures).tokens()
    if stream:
        return tokens
    for _ in tokens:
        pass
    return Generated([row.tokens for row in rows], [row.finished for row in rows], [row.levels for row in rows], figures)


def _check_functions(decoder: Decoder, schedule: Schedule) -> None:
    needed = ("prefill", schedule.draft, "verify") if schedule.is_speculative else ("prefill", *schedule.functions)
    missing = [name for name in needed if name not in decoder]
    if missing:
        raise InputError(f"this model has no function {missing[0]}: make it with compile_decoder, or compile it with passes='kv-cache'")
