"""What the notebooks of a run leave, gathered for its report."""

import pytest

from studylib.report import tables
from studylib.study import notebooks as batch
from studylib.study.records import RecordError, Store


@pytest.fixture
def publish(tmp_path):
    store = Store(tmp_path)

    def publish(name, records):
        for record in records:
            store.save(record)
        batch.publish(tmp_path / "run", name, records, {}, tables.scoreboard(records))
        return tmp_path / "run" / f"{name}.ipynb"

    return publish


def test_records_of_several_notebooks_count_once(publish, tmp_path, picture):
    notebooks = [publish("04_ptq_vs_qat", picture[:5]), publish("03_bit_allocation", picture[3:7])]
    found = batch.used_records(tmp_path / "run", notebooks, tmp_path / "records")
    assert [record.key for record in found] == [record.key for record in picture[:7]]


def test_the_summary_adds_only_settings_that_no_other_notebook_has(publish, tmp_path, picture, make_record):
    other_seed = make_record("llm-qat", "4-8-4", loss=3.4, seed=1)
    notebooks = [publish("00_claims", [*picture, other_seed]), publish("04_ptq_vs_qat", picture[5:])]
    found = batch.used_records(tmp_path / "run", notebooks, tmp_path / "records")
    assert [r.key for r in found] == [r.key for r in picture[5:] + picture[:5]]  # the run's own training, and no other
    alone = batch.used_records(tmp_path / "run", notebooks[:1], tmp_path / "records")
    assert len(alone) == len(picture) + 1


def test_a_record_that_is_gone_is_named(publish, tmp_path, picture):
    notebooks = [publish("04_ptq_vs_qat", picture)]
    (tmp_path / "records" / f"{picture[0].key}.json").unlink()
    with pytest.raises(RecordError, match=picture[0].key):
        batch.used_records(tmp_path / "run", notebooks, tmp_path / "records")


def test_methods_that_a_model_cannot_have_can_be_left_out(tmp_path):
    (notebook,) = batch.find_notebooks(["04"])
    given = {"model": "tiny-random", "profile": "smoke", "results": str(tmp_path), "seeds": [0]}
    given |= {"methods": ["rtn", "gptq"], "searched": [], "smoothed": []}
    assert {arm.method for arm in batch.planned(notebook, given)} == {"full-precision", "rtn", "gptq", "llm-qat"}
