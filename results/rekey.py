"""Key the records of an older studylib anew: python results/rekey.py FOLDER...

FOLDER: a results folder, or one that holds record files. Notes of what notebooks showed (published.json) follow.
A record of format 2 gets the lengths of its responses, by which their perplexity weighs them now, its digest, and a key
by the present numerics versions. Scores stay as they are. Records whose scores would be others now are left as they
are, and named: of models whose tokenizer puts a BOS, of TriviaQA, and of weights of which double quantization turned a
sign. A record whose loss was called "hidden" when that was the raw error of hidden states gets its present name,
"raw-hidden", in either format.
"""

import functools
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from studylib.config import HIDDEN, RAW_HIDDEN, Arm, Format, in_bitsandbytes, split_loss, write_whole
from studylib.data import conversation, instruction_pairs, load_model, load_tokenizer
from studylib.evaluate.scores import PAIR_TOKENS
from studylib.quant import decoder_linears, encode
from studylib.quant.formats import _encode_scales
from studylib.study.records import FORMAT, Record, arm_key, contents, numerics, read_record


def changed(arm: Arm) -> str | None:
    """Why the arm's scores are others now; None where they are not."""
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


def is_raw(fields: dict) -> bool:
    """Whether a record's loss has the raw error of hidden states under the name that another one has now, which came
    with a numerics version of its own."""
    loss = (fields["arm"].get("training") or {}).get("loss", "")
    return HIDDEN in loss.split("+") and "hidden states" not in fields["provenance"].get("numerics", {})


def renamed(arm: Arm) -> Arm:
    """The arm with "raw-hidden" for "hidden" in its loss."""
    assert arm.training is not None
    logits, features = split_loss(arm.training.loss)
    parts = [RAW_HIDDEN if part == HIDDEN else part for part in features]
    return replace(arm, training=replace(arm.training, loss="+".join([*([logits] if logits else []), *parts])))


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


def main(folders: list[str]) -> None:
    found: dict[str, str] = {}
    for folder in map(Path, folders):
        for path in sorted(folder.rglob("*.json")):
            fields = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(fields, dict) or not {"key", "arm"} <= fields.keys():
                continue
            found_format, old = fields.pop("format", 1), fields["key"]
            if found_format not in (2, FORMAT) or (found_format == FORMAT and not is_raw(fields)):
                continue
            arm = Arm.from_dict(fields["arm"])
            arm = renamed(arm) if is_raw(fields) else arm
            if found_format == FORMAT:
                record = replace(read_record(path), key=arm_key(arm), arm=arm)
            elif why := changed(arm):
                print(f"{path.name}: left, {why}; run it again")
                continue
            else:
                record = keyed_anew(fields, arm)
            write_whole(path.with_name(record.file_name), record.to_json())
            path.unlink()
            found[old] = record.key
        for path in sorted(folder.rglob("published.json")):
            published = json.loads(path.read_text(encoding="utf-8"))
            published["records"] = [found.get(key, key) for key in published["records"]]
            write_whole(path, json.dumps(published, indent=1))
    print(f"{len(found)} records have a key of today")


if __name__ == "__main__":
    main(sys.argv[1:])
