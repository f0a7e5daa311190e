"""Generating tokens with a program that has `prefill` and `decode` functions over explicit caches.

From the prompt to the token: `options` checks a call, `rows` and `scheduler` decide who runs when, `plain` and `speculative` take the
rows a step or a burst further, `dispatch` runs a function on some rows of the `caches`, `sampler` picks tokens, `generated` is what
comes back.
"""
