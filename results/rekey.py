"""Key the records of an older studylib (format 2) anew: python results/rekey.py FOLDER...

FOLDER: a results folder, or one that holds record files. Each record gets the lengths of its responses, by which their
perplexity weighs them now, its digest, and a key by the present numerics versions; notes of what notebooks showed
(published.json) follow. Scores stay as they are. Records whose scores would be others now are left as they are, and
named: of models whose tokenizer puts a BOS, of TriviaQA, and of weights of which double quantization turned a sign.
"""

import functools
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from studylib.config import Arm, Format, in_bitsandbytes, write_whole
from studylib.data import conversation, instruction_pairs, load_model, load_tokenizer
from studylib.evaluate.scores import PAIR_TOKENS
from studylib.quant import decoder_linears, encode
from studylib.quant.formats import _encode_scales
from studylib.study.records import FORMAT, Record, arm_key, contents, numerics


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
            if not isinstance(fields, dict) or not {"key", "arm"} <= fields.keys() or fields.pop("format", 1) != 2:
                continue
            arm = Arm.from_dict(fields["arm"])
            if why := changed(arm):
                print(f"{path.name}: left, {why}; run it again")
                continue
            old = fields["key"]
            record = keyed_anew(fields, arm)
            write_whole(path.with_name(record.file_name), record.to_json())
            path.unlink()
            found[old] = record.key
        for path in sorted(folder.rglob("published.json")):
            published = json.loads(path.read_text(encoding="utf-8"))
            published["records"] = [found.get(key, key) for key in published["records"]]
            write_whole(path, json.dumps(published, indent=1))
    print(f"{len(found)} records of format 2 are of format {FORMAT} now")


if __name__ == "__main__":
    main(sys.argv[1:])
