"""The search for learning rates: where it begins, how it walks, what it leaves."""

import dataclasses
import json
import math

import pytest

from studylib.cli import main
from studylib.config import NOTHING, Rate, find_rates, rates_text
from studylib.config.budgets import profile
from studylib.config.learning_rates import parse_rates
from studylib.config.settings import Adapter, Format, Scheme
from studylib.data.corpora import windows
from studylib.methods.arms import build_arm, rate_case
from studylib.study import notebooks as batch
from studylib.study import rates, run, schedule
from studylib.study.rates import FACTOR, GRID_RATE, cases, search, validation_loss
from studylib.study.records import REFERENCE, Store, arm_key, read_records

SMOKE = profile("smoke")
INT3 = {"format": Format("int-full", 3, 32)}


def arm(method="l4q", bits="3-16-16", seed=0, **changes):
    return build_arm(SMOKE, "tiny-random", method, bits, seed, **(INT3 | changes if method != "llm-qat" else changes))


def walked(losses, start):
    """The rates that a walk asks for, and where it ends, on a landscape: losses before, after a quarter and half."""
    walk, asked = rates._walk(start), []
    given = next(walk)
    while True:
        asked.append(rates.rate_of(given))
        own = losses(asked[-1])
        own = own if isinstance(own, list) else [19.0, 10 + own, 10 + own]
        limit = given.budget.limit
        try:
            given = walk.send(own[:2] if limit is not None and not own[1] <= limit else own)
        except StopIteration as end:
            return asked, end.value


def log10(x):
    return math.log10(x)


@pytest.mark.parametrize("best", [1e-5, 3e-4, 1e-3, 0.1])
def test_a_walk_ends_at_the_bottom_whichever_side_it_is_on(best):
    (start,) = cases([arm("qlora")]).values()
    asked, end = walked(lambda rate: abs(log10(rate.learning_rate / best)), start)
    assert abs(log10(end.learning_rate / best)) <= log10(FACTOR) / 2 + 0.01 and end.grid_rate is None
    assert len(asked) == len(set(asked)) >= 3  # both neighbours of the best were tried
    assert {float(f"{end.learning_rate * factor:.2g}") for factor in (FACTOR, 1 / FACTOR)} <= {
        rate.learning_rate for rate in asked
    }


def test_a_learned_grid_is_searched_after_the_adapter():
    (start,) = cases([arm()]).values()
    assert rates.rate_of(start).grid_rate == GRID_RATE
    asked, end = walked(lambda rate: abs(log10(rate.learning_rate / 1e-3)) + abs(log10(rate.grid_rate / 0.1)), start)
    assert end.learning_rate == pytest.approx(9.5e-4) and end.grid_rate == pytest.approx(0.1, rel=0.06)
    assert all(rate.grid_rate == GRID_RATE for rate in asked[:3]) and all(rate.grid_rate < 1 for rate in asked)


def test_a_grid_that_is_trained_alone_is_searched_alone():
    (start,) = cases([arm("efficientqat")]).values()
    asked, end = walked(lambda rate: abs(log10(rate.grid_rate / 0.1)), start)
    assert end.grid_rate == pytest.approx(0.1, rel=0.06)
    assert {rate.learning_rate for rate in asked} == {rates.rate_of(start).learning_rate}


def test_a_training_that_diverges_is_no_choice_and_no_landscape_ends_the_walk():
    (start,) = cases([arm("qlora")]).values()
    _, end = walked(lambda rate: math.inf if rate.learning_rate > 1e-3 else -rate.learning_rate, start)
    assert end.learning_rate == 1e-3
    asked, _ = walked(lambda rate: -rate.learning_rate, start)
    assert len(asked) == 1 + rates.MOST


def test_a_rate_that_is_behind_after_a_quarter_is_given_up(tmp_path):
    (own,) = cases([arm("qlora", tuning={"steps": 8})]).values()
    whole = rates.with_rate(own, dataclasses.replace(rates.rate_of(own), learning_rate=3e-3))
    (record,) = schedule.run([rates._half(whole)], tmp_path)
    assert [point["step"] for point in record.curve] == [0, 2, 4] and len(record.training) == 4
    before = dataclasses.replace(whole, tuning=dataclasses.replace(whole.tuning, steps=8))
    (complete,) = schedule.run([before], tmp_path)
    assert complete.curve[:3] == record.curve and complete.training[:4] == record.training  # the same schedule
    loss = record.curve[1]["loss"]
    (kept,) = schedule.run([rates._half(whole, loss * 1.001)], tmp_path)
    assert kept.curve == record.curve and validation_loss(kept) == record.curve[-1]["loss"]
    (given_up,) = schedule.run([rates._half(whole, loss * 0.999)], tmp_path)
    assert given_up.curve == record.curve[:2] and validation_loss(given_up) is None
    assert given_up.cost["tokens"]["trained"] < kept.cost["tokens"]["trained"]
    assert not Store(tmp_path).model_file(kept.key).exists() and Store(tmp_path).model_file(complete.key).exists()


def test_a_search_half_way_would_have_chosen_as_well_as_one_to_the_end():
    """On the 83 trainings to their end that the committed rates of 21 settings were chosen from."""
    tried = {}
    for record in read_records(REFERENCE / "rates" / "records"):
        if record.arm.budget.stop is None:
            case = rate_case(record.arm.method, record.arm.bits, record.arm.format, record.arm.scheme)
            tried.setdefault(case, {})[rates.rate_of(record.arm)] = record
    behind = {}
    for case, records in tried.items():
        first = min(records.values(), key=lambda record: record.provenance["finished"])
        unknown = [19.0, math.inf, math.inf]  # a rate that was not tried to its end
        _, chosen = walked(
            lambda rate, records=records, unknown=unknown: (
                rates.validation_losses(records[rate])[:3] if rate in records else unknown
            ),
            first.arm,
        )
        losses = [validation_loss(record) for record in records.values()]
        behind[case] = validation_loss(records[chosen]) / min(losses) - 1
    assert len(behind) == 21 and sum(share > 0.005 for share in behind.values()) <= 3 and max(behind.values()) < 0.03


def test_the_page_says_what_a_search_for_all_of_a_notebook_takes(tmp_path):
    (notebook,) = batch.find_notebooks(["05"])
    shares = []
    for seeds in ([0, 1, 2], [0]):
        given = {"model": "smollm2-135m", "profile": "quick", "results": str(tmp_path), "seeds": seeds}
        arms = batch.wanted_arms(notebook, given)
        shares.append(rates.cost(list(cases(arms).values()), arms, tmp_path))
    three, one = (f"{share:.0%}" for share in shares)
    page = " ".join((REFERENCE.parents[1] / "docs" / "deviations.md").read_text().split())
    assert f"is planned at {three} of the work of its arms with three seeds, and at {one} with one" in page


def test_arms_that_are_compared_share_a_rate():
    same = [
        arm(),
        arm(seed=1),
        arm(adapter=Adapter(4, 4)),
        arm(adapter=Adapter(init="lsq+")),
        arm(format=Format("int-full", 3, 16)),
    ]
    others = [arm(format=Format("affine", 3, 32)), arm("qlora"), arm("llm-qat", "4-8-4")]
    others += [arm("llm-qat", "4-8-4", scheme=Scheme("lsq"))]
    found = cases([*same[1:3], same[0], *same[3:], *others, build_arm(SMOKE, "tiny-random", "rtn", "4-8-4")])
    assert sorted(found) == [
        "l4q 3-16-16 affine",
        "l4q 3-16-16 int-full",
        "llm-qat 4-8-4 lsq",
        "llm-qat 4-8-4 symmetric",
        "qlora 3-16-16 int-full",
    ]
    chosen = found["l4q 3-16-16 int-full"]
    assert chosen == rates._begun(dataclasses.replace(same[0], evaluation=NOTHING))  # the plainest, of the least seed


def test_a_search_takes_the_least_validation_loss_and_goes_on_where_it_was(tmp_path, monkeypatch):
    wanted, told = [arm(), arm("llm-qat", "4-8-4")], {}
    monkeypatch.setattr(rates, "MOST", 2)
    chosen, records = search(wanted, tmp_path, told=told.__setitem__)
    assert chosen == told and sorted(chosen) == ["l4q 3-16-16 int-full", "llm-qat 4-8-4 symmetric"]
    for case, rate in chosen.items():
        own = {
            rates.rate_of(r.arm): validation_loss(r)
            for r in records
            if r.arm.method == case.split()[0] and validation_loss(r) is not None
        }
        assert own[rate] == min(own.values())
    assert all(
        record.arm.budget and record.arm.evaluation == NOTHING and "perplexity/wikipedia" not in record.metrics
        for record in records
    )
    monkeypatch.setattr(run, "carry_out", None)
    assert search(wanted, tmp_path)[0] == chosen  # nothing is computed again


def test_validation_text_is_not_scored_and_not_generated(tmp_path, monkeypatch, tiny_tokenizer):
    from studylib.train import distillation

    seen = []
    original = distillation.corpora.windows

    def watched(corpus, tokenizer, length, count, split):
        seen.append((corpus, split))
        return original(corpus, tokenizer, length, count, split)

    monkeypatch.setattr(distillation.corpora, "windows", watched)
    (own,) = cases([arm("llm-qat", "4-8-4")]).values()
    schedule.run([own], tmp_path)
    assert set(seen) == {("wikipedia", "training"), ("c4", "training")}
    scored, held = (windows("c4", tiny_tokenizer, 32, 2, split) for split in ("evaluation", "training"))
    assert not (scored[:, None] == held[None]).all(-1).any()


def test_chosen_rates_reach_the_arms():
    given = {"l4q 3-16-16 int-full": Rate(0.5, 0.25), "llm-qat 4-8-4 symmetric": Rate(0.125)}
    budget = SMOKE.with_rates(given)
    tuned = build_arm(budget, "tiny-random", "l4q", "3-16-16", **INT3, adapter=Adapter(4, 4)).tuning
    assert (tuned.learning_rate, tuned.grid_rate) == (0.5, 0.25)
    trained = build_arm(budget, "tiny-random", "llm-qat", "4-8-4", training={"loss": "labels"}).training
    assert (trained.learning_rate, trained.grid_rate) == (0.125, None)
    usual = build_arm(budget, "tiny-random", "llm-qat", "8-8-8").training
    assert usual.learning_rate == SMOKE.training.learning_rate
    assert build_arm(budget, "tiny-random", "l4q", "3-16-16", **INT3, tuning={"learning_rate": 2.0}).tuning == (
        dataclasses.replace(tuned, learning_rate=2.0)
    )
    own = Scheme(rotated=True, activations="asymmetric")
    assert (
        rate_case("gptq+llm-qat", "4-4-16", None, own)
        == "gptq+llm-qat 4-4-16 symmetric with asymmetric activations rotated"
    )
    assert rate_case("lora", "16-16-16", Format("affine", 4, 32), Scheme()) == "lora 16-16-16"  # merged to it, only


def test_a_file_of_rates_is_read_back(tmp_path):
    given = {"l4q 3-16-16 int-full": Rate(1e-3, 0.01), "lora 16-16-16": Rate(3e-4)}
    text = rates_text("own", "quick", given)
    assert parse_rates(text, "file") == ("own", "quick", given)
    file = tmp_path / "rates.json"
    file.write_text(text)
    assert find_rates("own", "quick", str(file)) == given and find_rates("own", "quick") == {}


def test_rates_that_were_chosen_on_other_data_are_not_taken_silently(tmp_path, capsys, monkeypatch):
    pairs, file = tmp_path / "faq.jsonl", tmp_path / "rates.json"
    pairs.write_text('{"instruction": "a", "output": "b"}\n')
    own = SMOKE.with_own({"pairs": str(pairs)})
    rate = {"lora 16-16-16": Rate(3e-4)}
    file.write_text(rates_text("tiny-random", "smoke", rate, own.own_contents))
    found = find_rates("tiny-random", "smoke", str(file))
    moved = pairs.rename(tmp_path / "moved.jsonl")  # the same by its contents
    assert SMOKE.with_own({"pairs": str(moved)}).with_rates(found).rates == tuple(rate.items())
    with pytest.raises(ValueError, match="was chosen on pairs, and this is the profile's data; choose anew"):
        SMOKE.with_rates(found)
    moved.write_text('{"instruction": "a", "output": "c"}\n')
    with pytest.raises(ValueError, match="was chosen on pairs, and this is pairs of other contents; choose anew"):
        SMOKE.with_own({"pairs": str(moved)}).with_rates(found)
    command = ["run", "--profile", "smoke", "--model", "tiny-random", "--notebooks", "05", "--rates", str(file)]
    assert main([*command, "--results", str(tmp_path / "results")]) == 2
    assert "was chosen on pairs, and this is the profile's data" in capsys.readouterr().err
    quick = profile("quick").with_own({"training_text": "c4"})
    for _ in range(2):  # said once
        assert quick.with_rates(find_rates("smollm2-135m", "quick")).rates
    told = capsys.readouterr().err
    assert (
        told.count("the learning rates were chosen on the profile's data, and this is training_text of your own") == 1
    )


@pytest.mark.parametrize(("model", "profile"), [("other", "quick"), ("own", "full")])
def test_rates_of_another_model_or_profile_are_refused(tmp_path, model, profile):
    file = tmp_path / "rates.json"
    file.write_text(rates_text("own", "quick", {}))
    with pytest.raises(ValueError, match=f"was written for 'own' at 'quick', not for {model} at {profile}"):
        find_rates(model, profile, str(file))


def test_rates_of_a_folder_are_found_by_its_relative_name(tmp_path, monkeypatch):
    (tmp_path / "own").mkdir()
    file = tmp_path / "rates.json"
    file.write_text(rates_text(str((tmp_path / "own").resolve()), "quick", {}))
    monkeypatch.chdir(tmp_path)
    assert find_rates("own", "quick", str(file)) == {}


def test_a_search_does_not_write_over_the_rates_of_another_model(tmp_path, capsys):
    file = tmp_path / "rates.json"
    file.write_text(text := rates_text("own", "smoke", {"lora 16-16-16": Rate(1e-3)}))
    command = ["rates", "--profile", "smoke", "--model", "tiny-random", "--notebooks", "05", "--results", str(tmp_path)]
    assert main([*command, "--output", str(file)]) == 2
    assert "was written for 'own' at 'smoke', not for tiny-random at smoke" in capsys.readouterr().err
    assert file.read_text() == text


@pytest.mark.parametrize(
    "text", ["", "{}", "[1]", '{"model": "m", "profile": "quick", "rates": {"a": 1}}', '{"rates": {"a": {"b": 1}}}']
)
def test_a_file_that_holds_no_rates_is_one_line(tmp_path, text, capsys):
    file = tmp_path / "rates.json"
    file.write_text(text)
    command = ["run", "--profile", "smoke", "--model", "tiny-random", "--notebooks", "05"]
    assert main([*command, "--rates", str(file), "--results", str(tmp_path / "results")]) == 2
    _, told = capsys.readouterr().err.splitlines()  # behind the line that a run begins with
    assert told.startswith(f"study: rates: '{file}' holds no rates as `study rates` writes them (")
    assert not (tmp_path / "results").exists()


def test_the_command_searches_and_writes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(rates, "MOST", 1)
    command = ["rates", "--profile", "smoke", "--model", "tiny-random", "--notebooks", "04", "--results", str(tmp_path)]
    file = tmp_path / "rates.json"
    assert main([*command, "--cases", "llm-qat 4-8-4", "--output", str(file)]) == 0
    told = capsys.readouterr()
    lines = told.out.splitlines()  # which case ends first depends on what the processor rounds
    assert any(line.startswith("llm-qat 4-8-4 symmetric: ") for line in lines) and "searching takes about " in told.err
    assert told.out.endswith(f"Figure: {tmp_path / 'rates.svg'}\n") and (tmp_path / "rates.svg").exists()
    found = find_rates("tiny-random", "smoke", str(file))
    assert sorted(found) == ["llm-qat 4-8-4 symmetric", "smoothquant+llm-qat 4-8-4 symmetric"]
    rate = found["llm-qat 4-8-4 symmetric"]
    assert main([*command, "--cases", "llm-qat 8-8-8", "--output", str(file)]) == 0  # the others stay
    assert find_rates("tiny-random", "smoke", str(file))["llm-qat 4-8-4 symmetric"] == rate
    assert main([*command, "--cases", "no such", "--output", str(file)]) == 2
    assert "cases: 'no such' is in none of llm-qat" in capsys.readouterr().err


def test_a_run_may_search_first_and_then_takes_what_was_chosen(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(rates, "MOST", 1)
    command = ["run", "--profile", "smoke", "--model", "tiny-random", "--notebooks", "02", "--results", str(tmp_path)]
    command += ["--set", "losses=[kl]", "alone=[]", "temperatures=[]"]
    assert main([*command, "--rates", "search"]) == 0
    told, output = capsys.readouterr(), tmp_path / "smoke-tiny-random"
    assert "1 settings; searching takes about " in told.err and "llm-qat 4-8-4 symmetric: " in told.out
    chosen = find_rates("tiny-random", "smoke", str(output / "rates.json"))["llm-qat 4-8-4 symmetric"]
    keys = json.loads((output / "02_distillation_loss" / "published.json").read_text())["records"]
    arms = [Store(tmp_path).load(key).arm for key in keys]
    assert {arm.training.learning_rate for arm in arms if arm.training} == {chosen.learning_rate}
    assert main([*command, "--minutes", "1e-9"]) == 0
    assert "learning rates are each method's usual ones; --rates search chooses them first" in capsys.readouterr().err


def test_the_committed_rates_are_the_best_of_those_that_were_tried():
    tried = {}
    for record in read_records(REFERENCE / "rates" / "records"):
        arm = record.arm
        assert arm.evaluation == NOTHING and arm_key(arm) == record.key and arm.model == "smollm2-135m"
        case = tried.setdefault(rate_case(arm.method, arm.bits, arm.format, arm.scheme), {})
        case[rates.rate_of(arm)] = rates.validation_loss(record)
    chosen = {
        case: min((loss, rate.text, rate) for rate, loss in losses.items() if loss is not None)[-1]
        for case, losses in tried.items()
    }
    assert find_rates("smollm2-135m", "quick") == chosen
    assert all(len(losses) >= 3 for losses in tried.values())
