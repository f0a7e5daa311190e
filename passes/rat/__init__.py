"""`rat-recurrence`: chunked recurrence with softmax across chunks in place of causal attention."""

from .rat_recurrence import RatRecurrence

__all__ = ["RatRecurrence"]
