from .comparisons import (
    after_deployment,
    bit_allocation,
    cache_cost,
    differences,
    learning_curve,
    recovery,
    size_accuracy,
)
from .memory import measured_beside_planned, memory_bars, papers_figure, papers_table, readable_memory
from .rates import searched_rates
from .sizes import family_frontier
from .weights import decoding_times, engine_speeds, error_by_layer, format_frontier, format_table, rows, tuning_panels

__all__ = [
    "after_deployment",
    "bit_allocation",
    "cache_cost",
    "decoding_times",
    "differences",
    "engine_speeds",
    "error_by_layer",
    "family_frontier",
    "format_frontier",
    "format_table",
    "learning_curve",
    "measured_beside_planned",
    "memory_bars",
    "papers_figure",
    "papers_table",
    "readable_memory",
    "recovery",
    "rows",
    "searched_rates",
    "size_accuracy",
    "tuning_panels",
]
