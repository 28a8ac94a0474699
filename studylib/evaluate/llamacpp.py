"""llama.cpp as an engine, where llama-cpp-python is installed: it scores token windows and decodes.

xllamacpp, which comes as a wheel, wraps llama.cpp's server, and that gives no probabilities of a prompt's tokens.
"""

import importlib.util
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from studylib.config import Decoding

INSTALL = "pip install '.[llama-cpp]'"


def installed() -> bool:
    """Whether llama-cpp-python is there."""
    return importlib.util.find_spec("llama_cpp") is not None


class LlamaCpp(nn.Module):
    """A GGUF file, loaded; called like a model of transformers: input_ids [N, T] -> .logits fp32 [N, T, vocabulary].

    adapter: a file of an adapter beside it. length: the most tokens of a text. As many threads as torch has. Weights
    are multiplied with activations that llama.cpp rounds to 8 bits in groups of 32, unless they are of 16 bits or more.
    Raises ValueError where llama-cpp-python is missing or llama.cpp does not take the file.
    """

    def __init__(self, path: Path, length: int, adapter: Path | None = None):
        super().__init__()
        if not installed():
            raise ValueError(f"llama.cpp is not installed; use {INSTALL}")
        from llama_cpp import Llama

        threads = torch.get_num_threads()
        try:
            self.engine = Llama(
                str(path),
                n_ctx=length,
                n_batch=length,
                n_ubatch=length,
                n_threads=threads,
                n_threads_batch=threads,
                logits_all=True,
                lora_path=None if adapter is None else str(adapter),
                verbose=False,
            )
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"llama.cpp does not take {path} ({error})") from error
        weakref.finalize(self, self.engine.close)  # else at the exit, when what it calls is gone
        self.device = torch.device("cpu")

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        """use_cache: nothing is kept from text to text in either case."""
        return SimpleNamespace(logits=torch.stack([self._logits(tokens) for tokens in input_ids]))

    def _logits(self, tokens: Tensor) -> Tensor:
        self.engine.reset()
        self.engine.eval(tokens.tolist())
        return torch.from_numpy(np.array(self.engine.scores[: len(tokens)]))

    def token_seconds(self, settings: Decoding) -> float:
        """As decoding.token_seconds."""
        vocabulary = self.engine.n_vocab()
        self._logits(torch.arange(settings.context) % vocabulary)
        begun = time.perf_counter()
        for _ in range(settings.tokens):
            self.engine.eval([int(self.engine.scores[self.engine.n_tokens - 1].argmax())])
        return (time.perf_counter() - begun) / settings.tokens
