from . import llamacpp, memory
from .decoding import decoding_seconds, token_seconds
from .divergence import FullPrecision
from .memory import GB, PURPOSES, TITLES, measure, plan, plan_text
from .scores import TASKS, check_requests, evaluation_windows, normal_error, pair_requests, score, weight_scores

__all__ = [
    "GB",
    "PURPOSES",
    "TASKS",
    "TITLES",
    "FullPrecision",
    "check_requests",
    "decoding_seconds",
    "evaluation_windows",
    "llamacpp",
    "measure",
    "memory",
    "normal_error",
    "pair_requests",
    "plan",
    "plan_text",
    "score",
    "token_seconds",
    "weight_scores",
]
