from . import corpora, models
from .corpora import Pair, beginning, evenly_spaced, instruction_pairs, text_statistics, window_documents, windows
from .family import check_family
from .generation import check_length, context_length, generate_windows
from .models import autocast, compute_dtype, device, gpu_count, load_model, load_tokenizer
from .prompts import TODAY, chat_opening, check_template, conversation, writes_date
from .sources import cache_folder, fetch

__all__ = [
    "TODAY",
    "Pair",
    "autocast",
    "beginning",
    "cache_folder",
    "chat_opening",
    "check_family",
    "check_length",
    "check_template",
    "compute_dtype",
    "context_length",
    "conversation",
    "corpora",
    "device",
    "evenly_spaced",
    "fetch",
    "generate_windows",
    "gpu_count",
    "instruction_pairs",
    "load_model",
    "load_tokenizer",
    "models",
    "text_statistics",
    "window_documents",
    "windows",
    "writes_date",
]
