"""README.md and study.json of an exported folder: what it is, how it was made and scored, and how each engine runs it.

Neither names a place on this machine.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from studylib.config import (
    ALPACA,
    BESIDE,
    BITSANDBYTES,
    CORPORA,
    OFF,
    PER_HEAD,
    SMOLLM2,
    SYMMETRIC,
    TINY,
    Arm,
    Evaluation,
    RealText,
    listed,
    markdown,
    number,
)
from studylib.data import models
from studylib.methods import (
    GGUF,
    INTEGERS,
    PEFT,
    corpus_title,
    find,
    pairs_title,
    title,
)
from studylib.study.compressed import MOST_BITS
from studylib.study.records import Record

NOTE = "study.json"  # in an exported folder: what `study run-check` has to know
BASES = {SMOLLM2: ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"), TINY: (None, "apache-2.0")}
ALPACA_LICENCE = "cc-by-nc-4.0"  # see docs/licences.md
UNKNOWN = "unknown"  # as the Hub calls a licence that nobody named
DATASETS = dict(zip(CORPORA, ("wikimedia/wikipedia", "allenai/c4"), strict=True)) | {ALPACA: "tatsu-lab/alpaca"}
LIBRARIES = {GGUF: "gguf", PEFT: "peft"}  # else transformers
PERPLEXITY = "perplexity/"
HUMMING = (4, 8)  # bits of activations that vLLM has a kernel for, beside packed weights of fewer than 8


@dataclasses.dataclass(frozen=True)
class Exported:
    """What was written: one of CONTAINERS, its bytes, the perplexities of what is loaded from there (none where it was
    not scored), and the largest distance between a weight in the file and in the record, in steps of its grid (None:
    not measured)."""

    container: str
    bytes: int
    metrics: dict[str, float]
    moved: float | None = None


def base_id(name: str, given: str | None) -> str | None:
    """The public name of a model: `given`, the one that is known, or a hub id itself; None for a local folder."""
    if given or name in BASES:
        return given or BASES[name][0]
    return None if Path(name).exists() else name.partition("@")[0]


def base_title(name: str, given: str | None) -> str:
    """What the model is called where no path may stand."""
    return base_id(name, given) or Path(name).name


def licence(arm: Arm) -> str:
    """The licence of the model, by the Hub's names: that of its base, and of the pairs where those ask for more."""
    if arm.instructions and arm.instructions.source == ALPACA:
        return ALPACA_LICENCE
    if arm.model in BASES:
        return BASES[arm.model][1]
    card = Path(arm.model) / "README.md"
    if card.is_file() and (text := card.read_text(encoding="utf-8")).startswith("---\n"):
        told = yaml.safe_load(text.split("---\n")[1])
        if isinstance(told, dict) and isinstance(told.get("license"), str):
            return told["license"]
    return UNKNOWN


def datasets(arm: Arm) -> list[str]:
    """Public texts that the model was trained or calibrated on, by the Hub's names."""
    sources = [arm.instructions.source] if arm.instructions else []
    sources += [arm.data.corpus] if isinstance(arm.data, RealText) else []
    return [DATASETS[source] for source in sources if source in DATASETS]


def note(record: Record, exported: Exported, base: str | None, file: str | None) -> str:
    """study.json: what was written, the text that it is scored on, and the record's perplexities on it."""
    arm = record.arm
    known = [corpus for corpus in arm.evaluation.corpora if corpus in CORPORA]
    return json.dumps(
        {
            "container": exported.container,
            "file": file,
            "base": base,
            "format": arm.format and dataclasses.asdict(arm.format),
            "record": record.key,
            "corpora": known,
            "windows": arm.evaluation.windows,
            "length": arm.evaluation.length,
            "perplexity": {corpus: record.metrics[PERPLEXITY + corpus] for corpus in known},
        },
        indent=1,
    )


def read_note(folder: Path) -> tuple[dict[str, Any], Evaluation]:
    """What `note` wrote, and what it says the model is scored on. ValueError for a folder without it."""
    try:
        told = json.loads((folder / NOTE).read_text(encoding="utf-8"))
        return told, Evaluation(tuple(told["corpora"]), told["windows"], told["length"])
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(
            f"folder: {folder} has no {NOTE} that can be read; use one that `study export` wrote"
        ) from error


def summary(record: Record, exported: Exported) -> str:
    """Size and perplexities of what was written, beside the record's, and what is left out, as Markdown."""
    reader = "gguf reads" if exported.container == GGUF else "transformers loads"
    lines = [f"{markdown(title(record.arm))}, {exported.container}: {exported.bytes / 1e6:.1f} MB", ""]
    columns: dict[str, Mapping[str, float | None]] = {"the record": record.metrics}
    if exported.metrics:
        columns = {f"as {reader} it, in fp32": exported.metrics} | columns
    lines += [f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for name in (name for name in record.metrics if name.startswith(PERPLEXITY)):
        text = name.removeprefix(PERPLEXITY)
        pairs = pairs_title(record.arm.evaluation.instructions)
        what = f"of held-out {pairs} responses" if text == "responses" else f"on {markdown(corpus_title(text))}"
        found = [number(metrics[name] or math.nan) for metrics in columns.values()]
        lines.append(f"| perplexity {what} | {' | '.join(found)} |")
    lines += [line for text in (*_rounding(record.arm, exported), *_numbers(record)) for line in ("", text)]
    return "\n".join(lines)


def _rounding(arm: Arm, exported: Exported) -> list[str]:
    """What is rounded otherwise than in the record."""
    bits, scheme, found = arm.widths, arm.scheme, []
    if exported.moved:
        found.append(
            f"Scales and minima are fp16 in the file: no weight is further than {exported.moved:.1g} steps of its grid "
            "from where it is in the record."
        )
    if exported.container != INTEGERS:
        if bits.activations != OFF:
            found.append(f"Activations: the engine's own here, {bits.activations} bits in the record.")
        if bits.cache != OFF:
            found.append(f"Key/value cache: 16 bits here, {bits.cache} in the record.")
        return found
    if bits.activations != OFF and scheme.on_the_fly == SYMMETRIC:
        found.append("Activations: max|x| / (2^(b-1) - 1/2) is their scale here, max|x| / (2^(b-1) - 1) in the record.")
    if bits.cache != OFF:
        shared = (
            "each head of a token has its own" if scheme.cache_scale == PER_HEAD else "all heads of a token share one"
        )
        found.append(
            f"Key/value cache: {bits.cache} bits here as in the record. Here each head of a token has a scale, and "
            f"keys are rounded after the rotary embedding; in the record {shared}, and keys are rounded "
            f"{scheme.keys.replace('-', ' ')} embedding."
        )
    return found


def _numbers(record: Record) -> list[str]:
    here = str(models.compute_dtype()).removeprefix("torch.")
    if record.provenance["compute_dtype"] == here:
        return []
    return [f"Made and scored with products in {here}, the record in {record.provenance['compute_dtype']}."]


def card(record: Record, exported: Exported, given: str | None, file: str | None) -> str:
    """README.md, with metadata as the Hub reads it. given: the public name of the base; file: of a GGUF."""
    arm, base = record.arm, base_id(record.arm.model, given)
    low = exported.container != PEFT and (arm.widths.weights != OFF or arm.format is not None)
    relation = "adapter" if exported.container == PEFT else "quantized" if low else "finetune"
    library = LIBRARIES.get(exported.container, "transformers")
    front: dict[str, Any] = {"base_model": base, "base_model_relation": relation} if base else {}
    front |= {
        "license": licence(arm),
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": sorted({library, exported.container.replace(" ", "-"), arm.method, f"{arm.bits}"}),
    }
    if found := datasets(arm):
        front["datasets"] = found
    metadata = f"---\n{yaml.safe_dump(front, sort_keys=False)}---"
    heading = f"# {markdown(f'{base_title(arm.model, given)}: {title(arm)}')}"
    parts = [metadata, heading, summary(record, exported), "## How it was made", _made(record)]
    parts += ["## How to run it", *_run(record, exported, base, file)]
    return "\n\n".join(parts) + "\n"


def _made(record: Record) -> str:
    arm, source = record.arm, record.provenance
    method, libraries = find(arm.method), source["libraries"]
    lines = [f"- Record {record.key} of this study, at commit {source['commit'] or 'none'}."]
    lines.append(f"- Method: {method.title}" + (f" ({method.source})." if method.source else "."))
    lines.append(f"- Bits of weights, activations and key/value cache: {arm.bits}; 16 means as they were.")
    if arm.format:
        lines.append(f"- Number format: {arm.format.title}.")
    if arm.adapter:
        how = "beside its base" if arm.merge == BESIDE and method.keeps_adapter else "merged"
        lines.append(f"- Adapter: rank {arm.adapter.rank}, {how}.")
    if arm.budget:
        budget = arm.budget
        lines.append(f"- Training: {budget.last} steps of {budget.batch}, learning rate {budget.learning_rate:g}.")
    if arm.instructions and arm.instructions.source == ALPACA:
        lines.append("- Trained on Alpaca's pairs, which are not for commercial use; that may hold for this model too.")
    if note := source["model"]["note"]:
        lines.append(f"- The base: {note}.")
    versions = ", ".join(f"{name} {libraries[name]}" for name in ("torch", "transformers") if name in libraries)
    return "\n".join([*lines, f"- Computed in {source['compute_dtype']} with {versions}."])


def _run(record: Record, exported: Exported, base: str | None, file: str | None) -> list[str]:
    arm = record.arm
    check = _code("sh", ["study run-check FOLDER"])
    if exported.container == GGUF:
        return [*_llama_cpp(arm, str(file)), check]
    if exported.container == PEFT:
        format, given = arm.format, [f'"{base}"', 'dtype="float32"']
        if format:
            kind = BITSANDBYTES[format.kind]
            settings = f'load_in_4bit=True, bnb_4bit_quant_type="{kind}", bnb_4bit_use_double_quant={format.double}'
            given += [f"quantization_config=BitsAndBytesConfig({settings})"]
        code = [
            "from peft import PeftModel",
            f"from transformers import AutoModelForCausalLM{', BitsAndBytesConfig' if format else ''}",
            "",
            "base = AutoModelForCausalLM.from_pretrained(",
            *(f"    {argument}," for argument in given),
            ")",
            'model = PeftModel.from_pretrained(base, "FOLDER")',
        ]
        return [_code("python", code), check]
    code = [
        "from transformers import AutoModelForCausalLM",
        "",
        'model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="float32")',
    ]
    found = [
        _code("python", code),
        _code("sh", ["lm_eval --model hf --model_args pretrained=FOLDER --tasks TASK"]),
        check,
    ]
    return [*found, *([_vllm(arm)] if exported.container == INTEGERS else [])]


def _llama_cpp(arm: Arm, file: str) -> list[str]:
    flags = ""
    found = []
    if arm.widths.cache != OFF:
        kind = "q4_0" if arm.widths.cache <= 4 else "q8_0"
        flags = f" --flash-attn on --cache-type-k {kind} --cache-type-v {kind}"
        found.append(
            f"The cache is rounded by flags, in groups of 32: {kind} is what llama.cpp has next to the record's "
            f"{arm.widths.cache} bits. llama.cpp rotates keys and values before that, which the record does not, "
            "where 64 divides the numbers of a head; LLAMA_ATTN_ROT_DISABLE=1 in the environment leaves it out."
        )
    if arm.widths.activations != OFF:
        found.append("llama.cpp rounds activations to 8 bits in groups of 32 by itself, whatever the file says.")
    code = [
        "from transformers import AutoModelForCausalLM",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("FOLDER", gguf_file="{file}", dtype="float32")',
    ]
    shell = [
        f'llama-completion -m FOLDER/{file}{flags} -p "The capital of France is" -n 8 -no-cnv',
        f"llama-perplexity -m FOLDER/{file}{flags} -f TEXT -c 256",
    ]
    return [
        "In llama.cpp (its library and both programs were run on such files):",
        _code("sh", shell),
        *found,
        "In transformers, which turns it into dense weights:",
        _code("python", code),
        _code(
            "sh", [f"lm_eval --model hf --model_args pretrained=FOLDER,gguf_file={file},tokenizer=FOLDER --tasks TASK"]
        ),
    ]


def _vllm(arm: Arm) -> str:
    """What vLLM makes of each field, as the checks of its loader's Python code have it, in plain words."""
    bits, scheme = arm.widths, arm.scheme
    symmetric = scheme.on_the_fly == SYMMETRIC
    lines = [
        "vLLM was not run. The checks of vLLM 0.33.0's loader (compressed_tensors.py) were, on such a config.json and "
        "without a GPU:",
        "",
    ]
    if bits.activations == OFF:
        lines.append(
            "- Weights: taken by CompressedTensorsWNA16, in 2 to 8 bits, with and without zero points (older releases: "
            "4 and 8 bits)."
        )
    elif bits.weights == MOST_BITS:
        lines.append(
            "- Weights and activations: taken by CompressedTensorsW8A8Int8, if activations have 8 bits and the weights "
            "neither groups nor zero points; else no scheme is found."
        )
    elif symmetric and bits.activations in HUMMING:
        name = f"CompressedTensorsWNA{bits.activations}Int"
        lines.append(f"- Weights and activations: taken by {name}; older releases find no scheme.")
    else:
        lines.append(
            "- Weights and activations: no scheme is found. Symmetric activations of "
            f"{listed(list(map(str, HUMMING)))} bits have one."
        )
    if bits.cache != OFF:
        lines.append(
            "- Cache: a kv_cache_scheme of integers is refused. Remove kv_cache_scheme from config.json for vLLM; the "
            "cache has 16 bits there then."
        )
    return "\n".join(lines)


def _code(language: str, lines: list[str]) -> str:
    return "\n".join([f"```{language}", *lines, "```"])
