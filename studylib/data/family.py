"""Models of one family: of several sizes, and with one tokenizer, so that they are scored on the same windows."""

import json
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from studylib.data import models
from studylib.data.corpora import beginning

ALLOWED = "use two or more models of one family, which share a tokenizer, for example --model SMALL --model LARGE"
PARTS = {"vocab": "vocabularies", "merges": "merges"}  # of a tokenizer's model, in words; others by their own names


def check_family(names: Sequence[str]) -> None:
    """Pass models that differ and make the same tokens of every text; no weights are read but for their hash.

    names: known names, local folders or hub ids. Tokenizers are compared by what they do: vocabulary, merges, how a
    text is split before them, and the tokens at the ends of texts. Their files may differ. Raises ValueError in one
    line for fewer than two names, one model twice, a name that leads to no model, or tokenizers that differ.
    """
    if len(names) < 2:
        raise ValueError(f"models: {', '.join(map(repr, names)) or 'none'} is no family; {ALLOWED}")
    own: dict[str, str] = {}
    for name in names:
        models.load_config(name)
        key = models.contents(name) or name
        if key in own:
            again = "is there twice" if own[key] == name else f"is the same model as {own[key]!r}"
            raise ValueError(f"models: {name!r} {again}; {ALLOWED}")
        own[key] = name
    first, *others = names
    known = _parts(models.load_tokenizer(first))
    for name in others:
        found = _parts(models.load_tokenizer(name))
        for part in known | found:
            if known.get(part) != found.get(part):
                raise ValueError(
                    f"models: the tokenizers of {first!r} and {name!r} differ in their {PARTS.get(part, part)}"
                    f"{_sizes(known.get(part), found.get(part)) if part == 'vocab' else ''}; {ALLOWED}"
                )


def _parts(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What decides which tokens a text becomes, by name; the vocabulary comes first."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        parts: dict[str, Any] = {"vocab": tokenizer.get_vocab(), "kind": type(tokenizer).__name__}
    else:
        whole = json.loads(backend.to_str())
        parts = {name: whole["model"][name] for name in ("vocab", *sorted(whole["model"].keys() - {"vocab"}))}
        parts |= {name: whole[name] for name in ("normalizer", "pre_tokenizer")}
        parts["added tokens"] = {token["content"]: token["id"] for token in whole["added_tokens"]}
    return parts | {"first tokens": beginning(tokenizer), "end-of-text tokens": tokenizer.eos_token_id}


def _sizes(one: Any, other: Any) -> str:
    """How many tokens each has, where these differ."""
    counts = [len(own or ()) for own in (one, other)]
    return f" ({counts[0]:,} and {counts[1]:,} tokens)" if counts[0] != counts[1] else ""
