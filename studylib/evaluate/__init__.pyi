from . import memory
from .memory import GB, PURPOSES, TITLES, measure, plan, plan_text
from .scores import TASKS, decoding_seconds, normal_error, score, weight_scores

__all__ = [
    "GB",
    "PURPOSES",
    "TASKS",
    "TITLES",
    "decoding_seconds",
    "measure",
    "memory",
    "normal_error",
    "plan",
    "plan_text",
    "score",
    "weight_scores",
]
