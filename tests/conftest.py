import os

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: the tests need no hub, and must not ask it

from studylib import models


@pytest.fixture
def tiny_model():
    return models.load_model("tiny-random")


@pytest.fixture
def fp32(monkeypatch):
    """Compute in fp32 on any machine, for comparisons that bf16 would blur."""
    monkeypatch.setattr(models, "compute_dtype", lambda: torch.float32)


@pytest.fixture(scope="session")
def tiny_tokenizer():
    return models.load_tokenizer("tiny-random")


@pytest.fixture(scope="session")
def language_model():
    """The smallest real one, with its tokenizer. Do not change it."""
    return models.load_model("smollm2-135m"), models.load_tokenizer("smollm2-135m")


@pytest.fixture
def shape():
    """The configuration of a decoder of any family, small enough to run in milliseconds."""
    return {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "eos_token_id": 0,
        "bos_token_id": None,
        "pad_token_id": 0,
    }
