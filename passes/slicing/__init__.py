"""Operator grouping with feature slicing."""

from .slice_groups import SliceGroups

__all__ = ["SliceGroups"]
