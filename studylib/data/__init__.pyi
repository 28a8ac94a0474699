from . import corpora, models
from .corpora import Pair, conversation, evenly_spaced, instruction_pairs, text_statistics, windows
from .generation import chat_opening, check_length, generate_windows
from .models import autocast, compute_dtype, load_model, load_tokenizer
from .sources import cache_folder, fetch

__all__ = [
    "Pair",
    "autocast",
    "cache_folder",
    "chat_opening",
    "check_length",
    "compute_dtype",
    "conversation",
    "corpora",
    "evenly_spaced",
    "fetch",
    "generate_windows",
    "instruction_pairs",
    "load_model",
    "load_tokenizer",
    "models",
    "text_statistics",
    "windows",
]
