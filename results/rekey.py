"""Key the records of an older studylib anew: python results/rekey.py FOLDER...

FOLDER: a results folder, or one that holds record files. Notes of what notebooks showed (published.json) follow.
A record without them gets the documents that its windows are from, by which its intervals count them; its key stays.
A record of format 2 gets the lengths of its responses, by which their perplexity weighs them now, its digest, and a key
by the present numerics versions. Scores stay as they are. Records whose scores would be others now are left as they
are, and named: of models whose tokenizer puts a BOS, of TriviaQA, of weights of which double quantization turned a
sign, of StatsQ and LSQ, which rounded activations and the cache as well, of the 4-bit kernel in fp32, and of rotated
models trained in bf16, which may have been trained without their rotations. In either format, arms get their present
names: "raw-hidden" is what the loss "hidden" was; L4Q's start is named where L4Q or QAT-LoRA began with it on affine
integers, and nowhere else. Files are named by what their arms are called now.
"""

import functools
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from studylib.config import HIDDEN, INITS, OF_WEIGHTS, RAW_HIDDEN, Arm, Format, in_bitsandbytes, split_loss, write_whole
from studylib.data import conversation, corpora, instruction_pairs, load_model, load_tokenizer, window_documents
from studylib.evaluate.scores import PAIR_TOKENS
from studylib.quant import decoder_linears, encode
from studylib.quant.formats import _encode_scales
from studylib.study.records import FORMAT, Record, arm_key, contents, numerics, read_record


def changed(arm: Arm, was: dict[str, int], of_format: int, computed: str) -> str | None:
    """Why the scores of an arm, run at these numerics versions and computed in that type, are others now; None where
    they are not."""
    if "weight grids" not in was and arm.scheme.grid in OF_WEIGHTS:
        return "its grid is one of weights alone now"
    if was.get("execution") == 1 and computed != "bfloat16":
        return "its kernel is entered in bf16 now"
    if was.get("rotation") == 1 and arm.budget and computed == "bfloat16":
        return "it may have been trained without its rotations"
    if of_format == FORMAT:
        return None
    tokenizer = load_tokenizer(arm.model)
    if tokenizer.bos_token_id in tokenizer("text").input_ids:
        return "its tokenizer puts a BOS"
    if "triviaqa" in arm.evaluation.tasks:
        return "TriviaQA's prompts are others"
    if arm.format and arm.format.double and not in_bitsandbytes(arm.format) and turns_signs(arm.model, arm.format):
        return "double quantization turned signs of its weights"
    return None


@functools.cache
def turns_signs(model: str, format: Format) -> bool:
    """Whether double quantization as it was until now leaves other codes of the scales than as it is."""
    plain = replace(format, double=False)
    return any(
        not torch.equal(
            _encode_scales(encode(layer.weight, plain).scales, negative=True)[0], encode(layer.weight, format).scales
        )
        for layer in decoder_linears(load_model(model)).values()
    )


def renamed(arm: Arm, numerics: dict[str, int]) -> Arm:
    """The arm as it is called now, of a record that was made at these numerics versions."""
    if arm.training and HIDDEN in arm.training.features and "hidden states" not in numerics:
        logits, features = split_loss(arm.training.loss)
        parts = [RAW_HIDDEN if part == HIDDEN else part for part in features]
        arm = replace(arm, training=replace(arm.training, loss="+".join([*([logits] if logits else []), *parts])))
    if arm.adapter and arm.adapter.init == INITS[0] and arm.method not in BEGUN_SO:
        arm = replace(arm, adapter=replace(arm.adapter, init=None))
    return arm


BEGUN_SO = ("l4q", "qat-lora")


def keyed_anew(fields: dict, arm: Arm) -> Record:
    scores, metrics, provenance = fields["scores"], fields["metrics"], fields["provenance"]
    if "loss/responses" in scores:
        tokenizer = load_tokenizer(arm.model)
        pairs = [conversation(tokenizer, pair) for pair in instruction_pairs("evaluation")[: arm.evaluation.pairs]]
        tokens = [float(len(ids[:PAIR_TOKENS]) - start) for ids, start in pairs]
        scores["tokens/responses"] = tokens
        metrics["perplexity/responses"] = float(np.exp(np.average(scores["loss/responses"], weights=tokens)))
    provenance |= {"numerics": numerics(arm), "contents": contents(arm)}
    provenance.setdefault("keyed_anew", fields["key"])
    return Record(**fields | {"key": arm_key(arm), "arm": arm})


@functools.lru_cache(maxsize=64)
def documents(model: str, corpus: str, length: int, count: int) -> list[float]:
    return window_documents(corpus, load_tokenizer(model), length, count, "evaluation").double().tolist()


def with_documents(record: Record) -> Record:
    """The record with the documents of its windows, where model and corpora are still what they were."""
    arm, provenance = record.arm, record.provenance
    wanted = arm.evaluation
    names = [corpus for corpus in wanted.corpora if f"loss/{corpus}" in record.scores]
    missing = [corpus for corpus in names if f"document/{corpus}" not in record.scores]
    try:
        same = all(corpora.sha256(corpus) == provenance["corpora"][corpus] for corpus in missing)
        same = same and contents(arm) == provenance.get("contents", {})
    except ValueError:  # a file that is gone
        same = False
    if not missing or not same:
        return record
    found = {f"document/{name}": documents(arm.model, name, wanted.length, wanted.windows) for name in missing}
    return replace(record, scores=record.scores | found)


def main(folders: list[str]) -> None:
    found: dict[str, str] = {}
    grouped = 0
    for folder in map(Path, folders):
        for path in sorted(folder.rglob("*.json")):
            fields = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(fields, dict) or not {"key", "arm"} <= fields.keys():
                continue
            old, of_format = fields["key"], fields.pop("format", 1)
            if of_format not in (2, FORMAT):
                continue
            before, was = Arm.from_dict(fields["arm"]), fields["provenance"].get("numerics", {})
            arm = renamed(before, was)
            if of_format == FORMAT and (arm, numerics(arm)) == (before, was):
                record = read_record(path)
                named = path.with_name(record.file_name)
                path.rename(named)
                if (labelled := with_documents(record)) != record:
                    write_whole(named, labelled.to_json())
                    grouped += 1
                continue
            if why := changed(arm, was, of_format, fields["provenance"]["compute_dtype"]):
                print(f"{path.name}: left, {why}; run it again")
                continue
            record = with_documents(
                keyed_anew({name: value for name, value in fields.items() if name != "sha256"}, arm)
            )
            named = path.with_name(record.file_name)
            write_whole(named, record.to_json())
            if named != path:
                path.unlink()
            found[old] = record.key
        for path in sorted(folder.rglob("published.json")):
            published = json.loads(path.read_text(encoding="utf-8"))
            published["records"] = [found.get(key, key) for key in published["records"]]
            write_whole(path, json.dumps(published, indent=1))
    print(f"{len(found)} records have a key of today, {grouped} of others the documents of their windows")


if __name__ == "__main__":
    main(sys.argv[1:])
