"""The papers' gigabytes beside ours, and how plans are kept."""

import math
import subprocess
import sys

import pytest

from studylib.config.budgets import SHAPES
from studylib.config.numerics import NUMERICS, Version
from studylib.evaluate import memory
from studylib.evidence import gigabytes
from studylib.evidence.gigabytes import CARD, DRIVER, GB, REPORTED, Plan, against_papers


def test_the_papers_total_for_qlora_and_why_ours_is_below():
    rows = [row for row in REPORTED if row.claim == "B6"]
    for row in rows:
        if row.part == "base":
            shape = memory.CONFIGURATIONS[row.model]
            linear = shape.num_hidden_layers * shape.hidden_size * (4 * shape.hidden_size + 3 * shape.intermediate_size)
            embedding = 32000 * shape.hidden_size
            assert (linear * (1 / 2 + 4 / 64) + (2 + 4) * embedding) / GB + 0.8 == pytest.approx(
                row.gigabytes, rel=0.011
            )
    sizes = ["llama-7b", "llama-65b"]
    table = against_papers(row for row in rows if row.model in sizes).set_index(["part", "model"])
    assert (table.reason[abs(table.ratio - 1) > 0.1] != "").all() and table.ours["total", "llama-65b"] < 48
    with_theirs = table.ours["total"] - table.ours["base"] + table.paper["base"]
    assert (with_theirs / table.paper["total"]).tolist() == pytest.approx([1, 1], abs=0.03)


def test_the_papers_memory_of_l4q_and_lora():
    rows = [row for row in REPORTED if row.claim == "C3" and row.model == "llama-7b" and row.method in ("lora", "l4q")]
    out_of_memory = next(row for row in REPORTED if row.gigabytes is None)
    table = against_papers([*rows, out_of_memory]).set_index("method")
    assert table.ratio[["lora", "l4q"]].tolist() == pytest.approx([1, 1], abs=0.05) and not any(
        table.reason[["lora", "l4q"]]
    )
    assert table.ours["l4q"] < 1.05 * table.ours["lora"]
    assert math.isnan(table.ratio["qat"]) and table.reason["qat"] == "the paper: out of memory; ours exceeds 80 GB"


def test_every_reported_number_has_a_reason_and_a_shape():
    assert {row.claim for row in REPORTED} == {"B6", "B7", "C3"} and all(row.reason for row in REPORTED)
    assert {row.model for row in REPORTED} <= set(SHAPES)


def test_what_is_written_here_without_the_planner_is_the_planners():
    assert (*Plan._fields,) == memory.PURPOSES and (GB, DRIVER) == (memory.GB, memory.DRIVER)
    assert memory.CARDS[-1] == CARD


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("STUDY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def made(monkeypatch):
    """The steps that were planned, rather than read; planning the same twice takes no second time."""
    made, known, plan = [], {}, memory.plan

    def planned(*config, **step):
        made.append(step)
        if repr(step) not in known:
            known[repr(step)] = plan(*config, **step)
        return known[repr(step)]

    monkeypatch.setattr(memory, "plan", planned)
    return made


def planned() -> Plan:
    gigabytes.planned.cache_clear()
    return gigabytes.planned("open-llama-3b", "lora", 4, 64)


def test_a_plan_is_kept_and_made_anew_where_what_was_kept_is_not_whole(cache, made, tmp_path, monkeypatch, capsys):
    first = planned()
    assert planned() == first and len(made) == 1
    kept, seal = sorted((cache / "plans").iterdir())
    whole, sum = kept.read_text(), seal.read_text()
    digit = str(first.base)[-1]
    others = ("", whole[:20], "[]", '{"base": 1}', "[-1, 2, 3, 4, 5]", whole.replace(digit, str(9 - int(digit))))
    for damaged, texts in ((kept, others), (seal, ("", sum[:20], sum.replace("a", "b"), whole))):
        for text in texts:
            damaged.write_text(text)
            assert planned() == first
    kept.unlink()
    assert planned() == first
    seal.unlink()
    assert planned() == first
    assert len(made) == 13 and planned() == first and len(made) == 13
    assert capsys.readouterr().err.count("; it is made again\n") == 12
    (tmp_path / "file").touch()
    monkeypatch.setenv("STUDY_CACHE", str(tmp_path / "file" / "cache"))
    assert planned() == first and len(made) == 14


def test_a_plan_is_made_anew_where_a_component_or_a_library_is_another(cache, made, monkeypatch):
    planned()
    monkeypatch.setattr(gigabytes, "version", lambda library: "0.1")
    planned()
    assert len(made) == 2
    monkeypatch.setitem(NUMERICS, "fine-tuning", Version(99, "for this test"))
    planned()
    assert len(made) == 3
    monkeypatch.setitem(NUMERICS, "ptq", Version(99, "LoRA has nothing to do with it"))
    monkeypatch.setattr(gigabytes, "version", lambda library: "0.1+cpu")  # another build of the same
    planned()
    assert len(made) == 3 and len(list((cache / "plans").glob("*.json"))) == 3


def test_what_is_kept_is_read_without_the_libraries(cache):
    first = planned()
    code = (
        "import sys; from studylib.evidence.gigabytes import planned; print(*planned('open-llama-3b', 'lora', 4, 64))"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; print('torch' in sys.modules)"], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [*map(str, first), "False"]


def test_what_a_deployed_model_takes_is_kept_too(cache, monkeypatch):
    asked = ("open-llama-3b", "qlora", 4, 16)
    gigabytes.planned_inference.cache_clear()
    first = gigabytes.planned_inference(*asked)
    monkeypatch.setattr(memory, "inference_bytes", None)
    gigabytes.planned_inference.cache_clear()
    assert gigabytes.planned_inference(*asked) == first > 0
