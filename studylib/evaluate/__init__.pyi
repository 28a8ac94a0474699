from . import llamacpp, memory
from .decoding import decoding_seconds, in_fresh_processes, pass_seconds, with_adapter
from .divergence import FullPrecision
from .memory import GB, PURPOSES, TITLES, inference_bytes, measure, plan, plan_text
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
    "in_fresh_processes",
    "inference_bytes",
    "llamacpp",
    "measure",
    "memory",
    "normal_error",
    "pair_requests",
    "pass_seconds",
    "plan",
    "plan_text",
    "score",
    "weight_scores",
    "with_adapter",
]
