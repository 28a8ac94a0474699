"""Key the records of an older studylib (format 1, found by hashes of source) anew: python results/rekey.py FOLDER...

FOLDER: a results folder, or one that holds record files. Each record gets a key by arm, contents and numerics versions,
a readable name, and its fields' present names; notes of what notebooks showed (published.json) follow. Numbers stay as
they are: who runs this says that they are those of numerics version 1, as those of the last version of format 1 are.
"""

import json
import sys
from pathlib import Path

from studylib.config.arm import Arm
from studylib.config.files import write_whole
from studylib.study.records import Record, arm_key, contents, numerics


def renamed(arm: dict) -> Arm:
    """An arm of format 1, whose groups were called blocks in formats and weight groups in schemes."""
    for part, old in (("format", "block"), ("scheme", "weight_group")):
        if arm.get(part):
            arm[part]["group"] = arm[part].pop(old)
    return Arm.from_dict(arm)


def keyed_anew(fields: dict) -> Record:
    arm, provenance = renamed(fields.pop("arm")), fields.pop("provenance")
    code = provenance.pop("code", {})
    provenance["libraries"] = {name: version for name, version in code.items() if not name.startswith("studylib.")}
    provenance |= {"numerics": numerics(arm), "contents": contents(arm)}
    key, before = arm_key(arm), fields.pop("key")
    provenance.setdefault("keyed_anew", before)
    return Record(key=key, arm=arm, provenance=provenance, **fields)


def main(folders: list[str]) -> None:
    found: dict[str, str] = {}
    for folder in map(Path, folders):
        for path in sorted(folder.rglob("*.json")):
            fields = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(fields, dict) and {"key", "arm", "scores"} <= fields.keys() and "format" not in fields:
                old = fields["key"]
                record = keyed_anew(fields)
                write_whole(path.with_name(record.file_name), record.to_json())
                path.unlink()
                found[old] = record.key
        for path in sorted(folder.rglob("published.json")):
            published = json.loads(path.read_text(encoding="utf-8"))
            published["records"] = [found.get(key, key) for key in published["records"]]
            write_whole(path, json.dumps(published, indent=1))
    print(f"{len(found)} records keyed anew")


if __name__ == "__main__":
    main(sys.argv[1:])
