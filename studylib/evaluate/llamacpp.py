"""llama.cpp as an engine, where llama-cpp-python is installed: it scores token windows and decodes.

xllamacpp, which comes as a wheel, wraps llama.cpp's server, and that gives no probabilities of a prompt's tokens. Of
llama-cpp-python, llama.cpp's own functions are called: its class Llama decodes one sequence at a time.
"""

import ctypes
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from studylib.config import Decoding, Engines, check_llama_cpp


class LlamaCpp(nn.Module):
    """A GGUF file, loaded; called like a model of transformers: input_ids [N, T] -> .logits fp32 [N, T, vocabulary].

    adapter: a file of an adapter beside it. length: the most tokens of a text; sequences: the most that are decoded at
    a time. As many threads as torch has, on processors alone. Weights are multiplied with activations that llama.cpp
    rounds to 8 bits in groups of 32, unless they are of 16 bits or more. Raises ValueError where llama-cpp-python is
    missing or llama.cpp does not take a file.
    """

    def __init__(self, path: Path, length: int, adapter: Path | None = None, sequences: int = 1):
        super().__init__()
        check_llama_cpp()
        import llama_cpp
        from llama_cpp._logger import set_verbose

        set_verbose(False)
        self.cpp, self.device = llama_cpp, torch.device("cpu")
        llama_cpp.llama_backend_init()
        where = llama_cpp.llama_model_default_params()
        where.n_gpu_layers = 0
        model = _there(llama_cpp.llama_model_load_from_file(str(path).encode(), where), path)
        weakref.finalize(self, llama_cpp.llama_model_free, model)
        how = llama_cpp.llama_context_default_params()
        how.n_ctx = how.n_batch = how.n_ubatch = length * sequences
        how.n_seq_max = sequences
        how.n_threads = how.n_threads_batch = torch.get_num_threads()
        self.context = _there(llama_cpp.llama_init_from_model(model, how), path)
        weakref.finalize(self, llama_cpp.llama_free, self.context)  # before the model: the last one comes first
        if adapter is not None:
            beside = _there(llama_cpp.llama_adapter_lora_init(model, str(adapter).encode()), adapter)
            adapters, scales = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(beside), (ctypes.c_float * 1)(1.0)
            llama_cpp.llama_set_adapters_lora(self.context, adapters, 1, scales)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self.batch = llama_cpp.llama_batch_init(length * sequences, 0, 1)
        weakref.finalize(self, llama_cpp.llama_batch_free, self.batch)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        """use_cache: nothing is kept from text to text in either case."""
        found = []
        for tokens in input_ids.tolist():
            self._forget()
            self._add([tokens], 0, every=True)
            self._decode()
            found.append(torch.tensor(np.array([self._logits(at) for at in range(len(tokens))])))
        return SimpleNamespace(logits=torch.stack(found))

    def pass_seconds(self, settings: Decoding | Engines, batch: int = 1) -> tuple[float, float]:
        """As decoding.pass_seconds."""
        context = (np.arange(settings.context) % self.vocabulary).tolist()
        self._forget()
        self._add([context] * batch, 0)
        begun = time.perf_counter()
        self._decode()
        likeliest = self._likeliest([(at + 1) * len(context) - 1 for at in range(batch)])
        read = time.perf_counter()
        for at in range(settings.tokens):
            self._add([[token] for token in likeliest], len(context) + at)
            self._decode()
            likeliest = self._likeliest(range(batch))
        return read - begun, (time.perf_counter() - read) / settings.tokens

    def _forget(self) -> None:
        self.cpp.llama_memory_clear(self.cpp.llama_get_memory(self.context), True)

    def _add(self, sequences: list[list[int]], first: int, every: bool = False) -> None:
        """Tokens of each sequence from position `first` on; every: logits of each token, not of the last alone."""
        batch, at = self.batch, 0
        for own, tokens in enumerate(sequences):
            for place, token in enumerate(tokens):
                batch.token[at], batch.pos[at] = token, first + place
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, own
                batch.logits[at] = every or place == len(tokens) - 1
                at += 1
        batch.n_tokens = at

    def _decode(self) -> None:
        if status := self.cpp.llama_decode(self.context, self.batch):
            raise ValueError(f"llama.cpp: a batch of {self.batch.n_tokens} tokens ended with status {status}")

    def _logits(self, at: int) -> np.ndarray:
        """Of the batch's token `at`, [vocabulary]: where llama.cpp has them."""
        return np.ctypeslib.as_array(self.cpp.llama_get_logits_ith(self.context, at), (self.vocabulary,))

    def _likeliest(self, places: Sequence[int]) -> list[int]:
        return [int(self._logits(at).argmax()) for at in places]


def _there(found: Any, path: Path) -> Any:
    if not found:
        raise ValueError(f"llama.cpp does not take {path}")
    return found
