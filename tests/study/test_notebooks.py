"""What the notebooks of a run leave, gathered for its report."""

import json
import re

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
    Store(tmp_path).find(picture[0].key).unlink()
    with pytest.raises(RecordError, match=picture[0].key[:12]):
        batch.used_records(tmp_path / "run", notebooks, tmp_path / "records")


def test_records_that_cannot_be_read_are_left_out_and_told(publish, tmp_path, picture):
    notebooks = [publish("04_ptq_vs_qat", picture), publish("03_bit_allocation", picture[:2])]
    gone, cut = Store(tmp_path).find(picture[0].key), Store(tmp_path).find(picture[1].key)
    gone.unlink()
    cut.write_text(cut.read_text()[:100])
    skipped = []
    found = batch.used_records(tmp_path / "run", notebooks, tmp_path / "records", skipped.append)
    assert [record.key for record in found] == [record.key for record in picture[2:]]
    assert {str(error) for error in skipped} == {str(error) for error in skipped[:2]}
    assert str(cut) in str(skipped[0]) + str(skipped[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([], "list indices must be"),
        ({"records": 5}, "not iterable"),
        ({"records": [5]}, "expected string"),
        ({"records": ["../models/x"]}, "'../models/x' is no record's key"),
        ({"records": ["*" * 16]}, "is no record's key"),
        ({"figures": []}, "has no attribute"),
        ({"figures": {"../../../etc/hostname": "t"}}, "'../../../etc/hostname' is no figure's name"),
        ({"figures": {"a\0b": "t"}}, "is no figure's name"),
        ({"figures": {"recovery": 5}}, "5 is no figure's title"),
    ],
)
def test_what_was_published_leads_nowhere_else(publish, tmp_path, picture, changes, message):
    publish("04_ptq_vs_qat", picture[:2])
    path = tmp_path / "run" / "04_ptq_vs_qat" / "published.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes if changes else changes))
    with pytest.raises(RecordError, match=f"{path} is not what a notebook published .*{re.escape(message)}") as told:
        batch.read_published(tmp_path / "run", "04_ptq_vs_qat")
    assert str(told.value).endswith("; run 04_ptq_vs_qat again") and "\n" not in str(told.value)


def test_results_are_the_repositorys_wherever_a_notebook_is_started(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    usual = str(batch.NOTEBOOKS.parent / "results" / "runs")
    assert batch.folders("", "") == (usual, f"{usual}/interactive")
    assert batch.folders("mine", "") == ("mine", "mine/interactive")
    assert batch.folders("", "drawn") == (usual, "drawn")


def test_methods_that_a_model_cannot_have_can_be_left_out(tmp_path):
    (notebook,) = batch.find_notebooks(["04"])
    given = {"model": "tiny-random", "profile": "smoke", "results": str(tmp_path), "seeds": [0]}
    given |= {"methods": ["rtn", "gptq"], "searched": [], "calibrated": [], "symmetric": [], "smoothed": []}
    assert {arm.method for arm in batch.wanted_arms(notebook, given)} == {"full-precision", "rtn", "gptq", "llm-qat"}


def test_what_is_wanted_is_told_without_running_the_notebook(tmp_path):
    """Only the parameters and the cells tagged "arms" are run: nothing is computed, drawn or written."""
    for notebook in batch.find_notebooks([]):
        given = {"model": "tiny-random", "profile": "smoke", "results": str(tmp_path / "none")}
        own = {name: value for name, value in given.items() if name in batch.default_parameters(notebook)}
        arms = batch.wanted_arms(notebook, own)
        assert bool(arms) == (notebook.stem not in ("00_claims", "07_memory"))
        assert all(arm.model == "tiny-random" for arm in arms)
    assert not list(tmp_path.iterdir())


def test_an_arm_that_cannot_be_is_told_when_it_is_asked_for():
    (notebook,) = batch.find_notebooks(["04"])
    with pytest.raises(ValueError, match="bits of the activations: 9 is not allowed"):
        batch.wanted_arms(notebook, {"model": "tiny-random", "profile": "smoke", "settings": ["4-9-4"]})
