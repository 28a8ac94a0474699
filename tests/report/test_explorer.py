"""What is explored in the browser: the same rule as in Python, one part without outside resources, and it works."""

import json
import re
import shutil
import subprocess

import pytest

import studylib
from studylib.report import explorer, recipes
from studylib.report.page import write_report

NODE, CHROMIUM = shutil.which("node"), shutil.which("chromium")
TOLERANCES = (0.01, 0.05, explorer.MOST)


@pytest.fixture
def families(make_record, picture, tuned):
    """Of a model that is served and of one that is fine-tuned, some of one size, some as good as the best."""
    equal = make_record("gptq", "4-8-4", loss=3.31, spread=0.3)
    return recipes.families([*picture, equal, *tuned])


def budgets(family):
    sizes = sorted({candidate.size for candidate in family.candidates})
    return [None, sizes[0] - 0.01, *sizes]


@pytest.mark.skipif(NODE is None, reason="node is not installed")
def test_the_browser_chooses_what_python_chooses(families):
    asked = [(at, budget, share) for at, own in enumerate(families) for budget in budgets(own) for share in TOLERANCES]
    data = [explorer.data(family) for family in families]
    code = f"{explorer.script()}\nconst data = {json.dumps(data)}, asked = {json.dumps(asked)};"
    code += "\nconsole.log(JSON.stringify(asked.map(([at, budget, share]) => choose(data[at], budget, share))));"
    done = subprocess.run([NODE, "-"], input=code, capture_output=True, text=True, timeout=60, check=True)
    for (at, budget, share), found in zip(asked, json.loads(done.stdout), strict=True):
        ordered = recipes.by_size(families[at])
        expected = recipes.choose(families[at], budget, share)
        if expected is None:
            assert found is None
            continue
        assert [ordered[i] for i in found["fitting"]] == expected.fitting
        assert ordered[found["best"]] is expected.best and ordered[found["chosen"]] is expected.chosen
        assert [ordered[i] for i in found["equals"]] == list(expected.equals)
    assert len(asked) >= 30 and any(own and own["equals"] for own in json.loads(done.stdout))


def test_the_usual_tolerance_is_what_is_recommended(families):
    for family in families:
        found = recipes.choose(family)
        assert found.chosen is recipes.recommend(family).chosen and found.best is recipes.recommend(family).best


def test_the_part_needs_nothing_else_and_ends_where_it_ends(picture, make_record):
    named = make_record("rtn", "8-8-8", loss=3.4, changes={"scheme": studylib.Scheme(rotated=True)})
    part = explorer.part([*picture, named])
    assert not re.search(r"(src|href)=|https?://(?!www\.w3\.org)|@import|url\(|fetch\(", part)
    assert part.count("</script>") == 1 and "</" not in explorer.as_json([{"title": "</script>"}])
    assert explorer.part([make_record("rtn", "4-8-4", status="diverged")]) == ""
    assert len(explorer.script().splitlines()) < 200


def test_a_notebook_shows_it_in_a_frame(picture, make_record):
    shown = studylib.explore(picture)._repr_html_()
    assert shown.startswith("<div><iframe srcdoc=") and "RTN at 8-8-8" in shown
    with pytest.raises(ValueError, match="records: no arm finished; there is nothing to explore"):
        studylib.explore([make_record("rtn", "4-8-4", status="diverged")])


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_browser_draws_it_and_sliders_change_it(picture, tmp_path):
    page = write_report(tmp_path, picture, [], "study run")
    set_budget = """<script>
      const part = (name) => document.querySelector(`.explorer [data-part="${name}"]`);
      const before = part("recommendation").textContent;
      part("budget").value = 0; part("budget").dispatchEvent(new Event("input"));
      part("filter").value = "qat"; part("filter").dispatchEvent(new Event("input"));
      part("table").querySelector("tbody tr").click();
      document.title = [before, part("recommendation").textContent].join("|");
    </script></body>"""
    page.write_text(page.read_text().replace("</body>", set_budget))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", page.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    before, after = re.search("<title>(.*?)</title>", dom)[1].split("|")
    assert before.startswith("RTN at 4-8-8") or before.startswith("RTN at 8-8-8")
    assert after.startswith("LLM-QAT at 4-8-8") and "as good" in after
    assert dom.count('class="dot') > 5 and "study show" in dom
    rows = re.search(r'data-part="table">.*?</table>', dom, re.S)[0]
    assert rows.count("<tr") == 4 and "LLM-QAT" in rows and "RTN" not in rows
