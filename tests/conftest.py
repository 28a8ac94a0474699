import pytest

from studylib import models


@pytest.fixture
def tiny_model():
    return models.load_model("tiny-random")


@pytest.fixture(scope="session")
def tiny_tokenizer():
    return models.load_tokenizer("tiny-random")
