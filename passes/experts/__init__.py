"""Mixtures of experts in captured graphs: the blocks where tokens choose experts, and `regroup-experts`, which makes one operation of
each."""

from .regroup_experts import RegroupExperts

__all__ = ["RegroupExperts"]
