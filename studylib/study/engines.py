"""An exported folder in the engines that are installed: perplexity beside the record's, size and speed."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from studylib.config import Decoding, Evaluation, Format, number
from studylib.data import models
from studylib.evaluate import llamacpp, pass_seconds, score
from studylib.methods import GGUF, PEFT, corpus_title
from studylib.study import compressed, export, gguf
from studylib.study.cards import PERPLEXITY, read_note

TIMED = Decoding(tokens=32)


@dataclasses.dataclass(frozen=True)
class Ran:
    """What an engine made of a folder: perplexities by corpus and seconds a decoded token; or, instead of them, why it
    did not run."""

    engine: str
    perplexity: dict[str, float] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    why: str = ""


def run_check(folder: Path, base: str | None = None) -> str:
    """Load an exported folder in transformers and llama.cpp, score both on the record's windows of known corpora, time
    the decoding of a token, and tell it as a Markdown table.

    base: of a peft adapter, the model that it is beside, as --model names it; None for its public name. Raises
    ValueError for a folder that `study export` did not write.
    """
    told, wanted = read_note(folder)
    size = sum(path.stat().st_size for ending in ("safetensors", "gguf") for path in folder.glob(f"*.{ending}")) / 1e6
    corpora = list(told["perplexity"])
    lines = [
        f"| | MB | {' | '.join(f'perplexity on {corpus_title(corpus)}' for corpus in corpora)} | tokens a second |",
        f"|---|---|{'---|' * len(corpora)}---|",
        f"| record {told['record'][:8]} | | {' | '.join(number(told['perplexity'][corpus]) for corpus in corpora)} | |",
    ]
    notes = []
    for ran in results(folder, told, wanted, base):
        if ran.why:
            notes += ["", f"{ran.engine}: {ran.why}"]
            continue
        cells = [
            f"{number(ran.perplexity[corpus])} ({ran.perplexity[corpus] / told['perplexity'][corpus] - 1:+.2%})"
            for corpus in corpora
        ]
        lines.append(f"| {ran.engine} | {size:.1f} | {' | '.join(cells)} | {number(1 / ran.seconds)} |")
    return "\n".join(lines + notes)


def results(folder: Path, told: dict[str, Any], wanted: Evaluation, base: str | None) -> Iterator[Ran]:
    """What each engine makes of the folder, one after the other."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    yield _ran("transformers", lambda: _transformers(folder, told, base), tokenizer, wanted)
    if told["container"] != GGUF:
        yield Ran("llama.cpp", why="reads GGUF alone; `study export --format gguf` writes it")
    else:
        yield _ran("llama.cpp", lambda: _llama_cpp(folder, told, wanted), tokenizer, wanted)


def _ran(engine: str, load: Callable[[], nn.Module], tokenizer: PreTrainedTokenizerBase, wanted: Evaluation) -> Ran:
    try:
        model = load()
    except (ValueError, OSError) as error:
        return Ran(engine, why=" ".join(str(error).split()))
    metrics, _ = score(model, tokenizer, wanted)
    _, seconds = model.pass_seconds(TIMED) if isinstance(model, llamacpp.LlamaCpp) else pass_seconds(model, TIMED)
    return Ran(engine, {name.removeprefix(PERPLEXITY): value for name, value in metrics.items()}, seconds)


def _transformers(folder: Path, told: dict[str, Any], base: str | None) -> nn.Module:
    if told["container"] == GGUF:
        if (folder / gguf.ADAPTER).exists():
            raise ValueError("reads the base of a GGUF without the adapter beside it; llama.cpp takes both")
        with compressed.without_bars():
            return AutoModelForCausalLM.from_pretrained(folder, gguf_file=told["file"], dtype="float32").eval()
    if told["container"] == PEFT:
        where = told["base"] if base is None else models.load_model(base).name_or_path
        return export.load(PEFT, told["format"] and Format(**told["format"]), where, folder)
    return export.load(told["container"], None, "", folder)


def _llama_cpp(folder: Path, told: dict[str, Any], wanted: Evaluation) -> nn.Module:
    adapter = folder / gguf.ADAPTER
    length = max(wanted.length, TIMED.context + TIMED.tokens)
    return llamacpp.LlamaCpp(folder / told["file"], length, adapter if adapter.exists() else None)
