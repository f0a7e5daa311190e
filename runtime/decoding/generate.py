"""From the arguments of `generate` to its result: checks them, allocates the caches, and runs the scheduler."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ...ir.errors import InputError
from .caches import Caches
from .dispatch import Dispatch
from .generated import Figures, Generated, Token
from .options import Limits, check_flags, check_positions, checked_limits, checked_prompts, checked_sampler
from .plain import PlainDecoding
from .rows import Row
from .sampler import Sampler
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
    if schedule.chooses_gamma:
        schedule = _with_gamma(schedule, decoder, checked, limits, sampler)
    # A burst may write as many slots behind a row's last one as it drafts.
    check_positions(checked, max_new_tokens, schedule.most_drafts, decoder.max_positions)
    rows = [Row(number, prompt, max_new_tokens) for number, prompt in enumerate(checked)]
    figures = Figures()
    if not rows or max_new_tokens == 0:
        return iter(()) if stream else Generated([[] for _ in rows], ["length"] * len(rows), [[] for _ in rows], figures)
    longest = max(map(len, checked))
    most_tokens = max(min(limits.chunk or longest, longest), schedule.most_drafts + 1)
    dispatch = Dispatch(Caches(decoder.cache_types, limits.batch, limits.capacity + schedule.most_drafts, most_tokens), decoder.device)
    make = SpeculativeDecoding if schedule.is_speculative else PlainDecoding
    decoding: Decoding = make(decoder, schedule, dispatch, sampler, figures)
    tokens = Scheduler(rows, decoder["prefill"], decoding, dispatch, sampler, limits, figures).tokens()
    if stream:
        return tokens
    for _ in tokens:
        pass
    return Generated([row.tokens for row in rows], [row.finished for row in rows], [row.levels for row in rows], figures)


def _with_gamma(schedule: Schedule, decoder: Decoder, prompts: Sequence[np.ndarray], limits: Limits, sampler: Sampler) -> Schedule:
    """Begins with the number of drafts that what was measured speaks for, and has no more than leave room for all tokens; none are plain
    decoding. Calls that draw take the same number whatever was measured and whichever rows there are, since what a seed gives depends
    on it."""
    if not sampler.is_greedy:
        return replace(schedule, most_drafts=schedule.gamma)
    longest = max(map(len, prompts), default=0)
    room = None if decoder.max_positions is None else decoder.max_positions - longest - limits.max_new_tokens + 1
    most = schedule.most_drafts if room is None else min(schedule.most_drafts, max(room, 0))
    return replace(schedule, gamma=decoder.gains[limits.batch].best(schedule.gamma, most), most_drafts=most)


def _check_functions(decoder: Decoder, schedule: Schedule) -> None:
    missing = [name for name in schedule.needed if name not in decoder]
    if missing:
        raise InputError(f"this model has no function {missing[0]}: make it with compile_decoder, or compile it with passes='kv-cache'")
