"""Records of older versions keep their numbers and get the names and keys of today."""

import dataclasses
import json
from pathlib import Path

import pytest

from studylib.data import load_tokenizer, window_documents
from studylib.study.records import _digest_of, arm_key, read_record

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "results" / "reference" / "records"
SHORT = ROOT / "tests" / "reference" / "records"  # two steps each


@pytest.fixture(scope="module")
def rekey(script):
    return script("results/rekey.py").main


def older(folder, method, change, records=RECORDS):
    """A record of the reference with `change` undone in its fields, as it was written before."""
    path = min(records.glob(f"{method}_*.json"))
    fields = json.loads(path.read_text())
    del fields["sha256"]
    change(fields)
    (folder / path.name).write_text(json.dumps(fields | {"sha256": _digest_of(fields)}))
    return read_record(path)


def keeps(found, known):
    """Whether all scores are as they were; documents of windows may have come to them."""
    return known.scores.items() <= found.scores.items()


def test_windows_without_documents_get_those_they_are_from_once(tmp_path, rekey, capsys):
    def undo(fields):
        for corpus in ("wikipedia", "c4"):
            fields["scores"].pop(f"document/{corpus}", None)

    known = older(tmp_path, "rtn_4-8-4_seed0", undo)
    rekey([str(tmp_path)])
    assert "1 of others the documents" in capsys.readouterr().out
    (file,) = tmp_path.iterdir()
    found, written = read_record(file), file.read_bytes()
    assert found.key == known.key == arm_key(found.arm)
    assert keeps(found, known)
    wanted = known.arm.evaluation
    for corpus in wanted.corpora:
        windows = (corpus, load_tokenizer(known.arm.model), wanted.length, wanted.windows, "evaluation")
        assert found.scores[f"document/{corpus}"] == window_documents(*windows).tolist()
    rekey([str(tmp_path)])
    assert file.read_bytes() == written and "0 of others" in capsys.readouterr().out


def test_the_old_default_of_starts_is_left_out_and_the_file_stays(tmp_path, rekey):
    def undo(fields):
        fields["arm"]["adapter"]["init"] = "l4q"

    known = older(tmp_path, "qlora", undo)
    rekey([str(tmp_path)])
    (file,) = tmp_path.iterdir()
    found = read_record(file)
    assert found.arm == known.arm and found.key == known.key == arm_key(found.arm) and keeps(found, known)
    assert found.arm.adapter.init is None


def test_what_began_with_l4qs_scales_says_so(tmp_path, rekey):
    def undo(fields):
        fields["provenance"]["numerics"]["learned grids"] = 1
        fields["key"] = "0" * 16

    known = older(tmp_path, "l4q", undo, SHORT)
    rekey([str(tmp_path)])
    (file,) = tmp_path.iterdir()
    found = read_record(file)
    assert found.arm == known.arm and found.key == known.key == arm_key(found.arm) and file.name == found.file_name
    assert found.arm.adapter.init == "l4q" and keeps(found, known)


def test_the_raw_loss_gets_its_name_and_other_grids_are_left(tmp_path, rekey, capsys):
    def raw(fields):
        fields["arm"]["training"]["loss"] = fields["arm"]["training"]["loss"].replace("raw-hidden", "hidden")
        fields["key"] = "0" * 16

    def of_everything(fields):
        fields["arm"]["scheme"]["grid"] = "statsq"

    known = older(tmp_path, "llm-qat_4-8-4_loss-kl-raw-hidden", raw)
    older(tmp_path, "rtn_4-8-4_seed0", of_everything)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("rtn*")}
    rekey([str(tmp_path)])
    found = read_record(tmp_path / known.file_name)
    assert keeps(found, known) and dataclasses.replace(found, scores=known.scores) == known
    assert before == {path.name: path.read_bytes() for path in tmp_path.glob("rtn*")}
    assert "left, its grid is one of weights alone now; run it again" in capsys.readouterr().out


def test_the_kernel_in_fp32_is_left_and_in_bf16_it_counts_as_it_did(tmp_path, rekey, capsys):
    def of(computed):
        def undo(fields):
            fields["provenance"]["numerics"]["execution"] = 1
            fields["provenance"]["compute_dtype"] = computed
            fields["key"] = "0" * 16

        return undo

    older(tmp_path, "4-bit-kernel", of("float32"))
    rekey([str(tmp_path)])
    assert "left, its kernel is entered in bf16 now; run it again" in capsys.readouterr().out
    known = older(tmp_path, "4-bit-kernel", of("bfloat16"))
    rekey([str(tmp_path)])
    found = read_record(tmp_path / known.file_name)
    assert keeps(found, known) and found.key == arm_key(found.arm)


def test_rotated_models_that_may_have_lost_their_rotations_in_training_are_left(tmp_path, rekey, capsys):
    def undo(fields):
        fields["provenance"]["numerics"]["rotation"] = 1
        fields["key"] = "0" * 16

    rounded = older(tmp_path, "rtn_4-4-16_rotated", undo)
    older(tmp_path, "llm-qat_4-4-16_rotated", undo)
    rekey([str(tmp_path)])
    assert "llm-qat_4-4-16_rotated" in (said := capsys.readouterr().out) and "without its rotations" in said
    found = {record.arm.method: record for record in map(read_record, tmp_path.iterdir())}
    assert found["llm-qat"].key == "0" * 16 and found["rtn"].key == arm_key(rounded.arm)
    assert keeps(found["rtn"], rounded)
