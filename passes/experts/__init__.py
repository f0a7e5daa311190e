"""Mixtures of experts in captured graphs: the blocks where tokens choose experts, `regroup-experts`, which makes one operation of
each, and `expert-choice`, which lets experts choose their tokens."""

from .capacity import CapacitySchedule
from .expert_choice import ExpertChoice
from .regroup_experts import RegroupExperts
from .statistics import RoutingStatistics, routing_statistics

__all__ = ["CapacitySchedule", "ExpertChoice", "RegroupExperts", "RoutingStatistics", "routing_statistics"]
