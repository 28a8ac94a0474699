from . import memory
from .memory import GB, PURPOSES, TITLES, measure, plan, plan_text
from .scores import TASKS, check_requests, decoding_seconds, normal_error, pair_requests, score, weight_scores

__all__ = [
    "GB",
    "PURPOSES",
    "TASKS",
    "TITLES",
    "check_requests",
    "decoding_seconds",
    "measure",
    "memory",
    "normal_error",
    "pair_requests",
    "plan",
    "plan_text",
    "score",
    "weight_scores",
]
