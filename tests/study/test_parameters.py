"""Parameters of notebooks: all are declared, the defaults pass, and what makes no sense is refused in one line."""

import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from studylib.methods.base import METHODS
from studylib.study import notebooks as batch
from studylib.study.parameters import FLAG, GROUP, PARAMETERS, check_parameter, check_parameters

PATHS = {path.stem: path for path in batch.find_notebooks([], family=True)}
DEFAULTS = {notebook: batch.default_parameters(path) for notebook, path in PATHS.items()}


def test_every_parameter_is_declared_and_every_default_passes():
    assert DEFAULTS.keys() == PARAMETERS.keys()
    for notebook, defaults in DEFAULTS.items():
        assert defaults.keys() <= PARAMETERS[notebook].keys()
        for name, default in defaults.items():
            assert check_parameter(notebook, name, default) == default


def test_examples_pass_and_survive_being_checked_twice():
    for notebook, declared in PARAMETERS.items():
        for name, parameter in declared.items():
            found = check_parameter(notebook, name, parameter.example)
            assert found == parameter.example and check_parameter(notebook, name, found) == found


def test_a_name_has_one_meaning_but_for_bits_and_methods():
    meanings = {}
    for declared in PARAMETERS.values():
        for name, parameter in declared.items():
            meanings.setdefault(name, set()).add(id(parameter))
    assert {name for name, found in meanings.items() if len(found) > 1} == {"bits", "methods"}


@pytest.mark.parametrize(
    ("number", "name", "value", "message"),
    [
        (
            "01_sampling_strategy",
            "top_ks",
            [50.0],
            "50.0 is not allowed; use a list of whole numbers from 0 to 10000000",
        ),
        (
            "01_sampling_strategy",
            "top_ks",
            None,
            "null is not allowed; leave the parameter out for its default, or use",
        ),
        ("01", "top_ks", [None], "None is not allowed"),
        ("01", "top_ks", [-1], "-1 is not allowed"),
        (
            "01_sampling_strategy",
            "temperatures",
            [math.inf],
            "inf is not allowed; use a list of numbers from 0.01 to 100",
        ),
        ("01", "temperatures", [math.nan], "nan is not allowed"),
        ("01", "temperatures", [True], "True is not allowed"),
        ("01", "temperatures", [0], "0 is not allowed"),
        ("01", "temperatures", [1, "1e0"], "1.0 is there twice; name it once"),
        (
            "01_sampling_strategy",
            "seeds",
            [],
            "[] is not allowed; use a list of whole numbers from 0 to 4294967295, at",
        ),
        ("01", "seeds", [2**32], "4294967296 is not allowed"),
        ("01", "seeds", [0, 1, 0], "0 is there twice; name it once"),
        ("01", "seeds", [False], "False is not allowed"),
        ("01", "seeds", list(range(1000)), "[0, 1, 2, 3, 4, 5, ...] is not allowed"),
        ("01", "jobs", 0, "0 is not allowed; use a whole number from 1 to 1024"),
        ("01", "extend", "010", "'010' is not allowed; use a whole number from 0"),
        ("01", "keep_checkpoints", 1, "1 is not allowed; use true or false"),
        ("01", "keep_checkpoints", "no", "'no' is not allowed; use true or false"),
        (
            "01_sampling_strategy",
            "corpora",
            ["pile"],
            "corpus: 'pile' is not known; use one of wikipedia, c4, or the path",
        ),
        ("01", "strategies", ["beam"], "'beam' is not allowed; use a list of greedy, sampled"),
        ("01", "model", "a\0b", r"'a\x00b' is not allowed; use a known name, a local folder"),
        ("01", "results", "a\nb", r"'a\nb' is not allowed; use the path of a folder"),
        (
            "02_distillation_loss",
            "losses",
            ["attention+kl"],
            "loss: 'attention+kl' is not allowed; write 'kl+attention'",
        ),
        ("02", "losses", ["kl", "kl"], "'kl' is there twice"),
        ("03", "settings", ["４-８-４"], "bit widths '４-８-４': write weights-activations-cache"),
        ("03", "settings", ["04-8-4"], "bit widths '04-8-4': write weights-activations-cache"),
        ("03", "settings", ["4-9-4"], "bits of the activations: 9 is not allowed; use 2 to 8, or 16"),
        ("12", "cache_bits", "4-8-16", "'4-8-16' is not allowed; use bit widths whose last is 2 to 8"),
        (
            "04_ptq_vs_qat",
            "methods",
            ["llm-qat"],
            "'llm-qat' is not allowed; use a list of rtn, smoothquant, gptq, awq or autoround",
        ),
        ("05", "methods", ["lora"], "'lora' is not allowed; use a list of qlora"),
        ("05", "bits", [4.0], "4.0 is not allowed; use a list of 4, 3, 2 or 8, at least one"),
        ("11", "ranks", [2**20], "1048576 is not allowed; use a list of whole numbers from 1 to 1024"),
        ("11", "few", "q_proj+q_proj", "layers: 'q_proj+q_proj' is not allowed; use 'all', or ends"),
        ("06", "widths", [8], "8 is not allowed; use a list of 4, 3 or 2, at least one"),
        ("06", "widths", [], "[] is not allowed"),
        ("07", "methods", ["gptq+lora"], "'gptq+lora' is not allowed; use a list of lora, qlora"),
        ("07", "bits", "4", "'4' is not allowed; use 4, 3, 2 or 8"),
        ("07", "batch", 10**12, "1000000000000 is not allowed; use a whole number from 1 to 65536"),
        ("07", "length", 1, "1 is not allowed; use a whole number from 2 to 1048576"),
        ("08", "group", -32, "-32 is not allowed; use a whole number from 2 to 65536, or 0"),
        (
            "08",
            "llama_cpp",
            "yes",
            "'yes' is not allowed; use auto (where it is installed or on record), always or never",
        ),
        ("06", "group", 1, "1 is not allowed; use a whole number from 2 to 65536, or 0 for the profile's"),
        ("01", "output", " ", "' ' is not allowed; use the path of a folder, or '' for the usual one"),
        ("04", "own", {"pair": "x.json"}, "own: 'pair' is not known; use one of pairs, text"),
        ("04", "own", "{windows: 1}", "windows: 1 is not allowed; use a whole number from 2"),
        ("04", "own", [], "[] is not allowed; use a dictionary of pairs, text"),
        ("08", "rank", 4, "is not declared; add it to studylib/study/parameters.py"),
        ("09", "rank", 4, "is not declared; add it to studylib/study/parameters.py"),
    ],
)
def test_what_makes_no_sense_is_one_line(number, name, value, message):
    notebook = next((stem for stem in PATHS if stem.startswith(number)), number)
    with pytest.raises(ValueError) as caught:
        check_parameter(notebook, name, value)
    assert str(caught.value).startswith(f"{notebook}: parameter {name}: {message}") and "\n" not in str(caught.value)


def test_what_papermill_passes_on_as_text_is_what_it_says():
    names = {"keep_checkpoints": "false", "temperatures": [1, "7e-1"], "seeds": [3], "batch": "not of this notebook"}
    check_parameters("01_sampling_strategy", names)
    assert names["keep_checkpoints"] is False and names["temperatures"] == [1.0, 0.7] and names["seeds"] == [3]
    assert all(type(value) is float for value in names["temperatures"]) and names["batch"] == "not of this notebook"
    assert FLAG.checked("True") is True and GROUP.checked(0) == 0


def test_models_of_a_family_may_come_as_a_text():
    """As papermill's -p passes them on; fewer than two are refused."""
    for text in (["a/b", "c"], '["a/b", "c"]', "[a/b, c]"):
        assert check_parameter("10_model_sizes", "models", text) == ["a/b", "c"]
    for text, shown in ((["a"], "['a']"), ("[a]", "'[a]'"), ("a", "'a'"), ("[a", "'[a'"), ("[1, 2]", "1")):
        with pytest.raises(ValueError, match="use a list of two or more models of one family") as caught:
            check_parameter("10_model_sizes", "models", text)
        assert str(caught.value).startswith(f"10_model_sizes: parameter models: {shown} is not allowed;")
    with pytest.raises(ValueError, match="'a' is there twice; name it once"):
        check_parameter("10_model_sizes", "models", ["a", "a"])


@pytest.mark.parametrize("notebook", PATHS)
def test_a_notebook_refuses_them_before_it_has_an_arm(notebook, tmp_path):
    """As papermill and Jupyter run it: the first cell after the parameters."""
    name, value = ("group", True) if notebook == "08_low_bit_execution" else ("profile", "Smoke")
    path = PATHS[notebook]
    if notebook == "00_claims":
        from papermill.iorw import load_notebook_node

        code = [cell.source for cell in load_notebook_node(str(path)).cells if cell.cell_type == "code"]
        with pytest.raises(ValueError, match=r"^00_claims: parameter profile: 'Smoke' is not allowed"):
            exec("\n".join([code[0], f"{name} = {value!r}", code[1]]), {"__name__": "__main__"})
        return
    with pytest.raises(ValueError, match=rf"^{notebook}: parameter {name}: .* is not allowed"):
        batch.wanted_arms(path, {"model": "tiny-random", "results": str(tmp_path), name: value})


# --- what passes can be planned ---------------------------------------------------------------------------------------

bits = st.integers(2, 8) | st.just(16)
setting = st.tuples(bits, bits, bits).map(lambda widths: "-".join(map(str, widths))).filter(lambda w: w != "16-16-16")
VALUES = {
    "01_sampling_strategy": {
        "top_ks": st.lists(st.integers(0, 300), unique=True, max_size=3),
        "temperatures": st.lists(st.floats(0.01, 100), unique=True, max_size=3),
        "extend": st.integers(0, 1000),
        "seeds": st.lists(st.integers(0, 2**32 - 1), unique=True, min_size=1, max_size=2),
        "bits": setting,
    },
    "02_distillation_loss": {
        "losses": st.lists(
            st.sampled_from(["kl", "labels", "kl+hidden", "labels+attention+raw-hidden", "hidden"]), unique=True
        ),
        "temperatures": st.lists(st.integers(1, 100) | st.sampled_from(["7e-1", "2.5"]), unique=True, max_size=2),
    },
    "03_bit_allocation": {"settings": st.lists(setting, unique=True, max_size=3)},
    "06_number_formats": {
        "widths": st.lists(st.sampled_from([2, 3, 4]), unique=True, min_size=1),
        "groups": st.lists(st.integers(2, 2**16), unique=True, max_size=3),
        "fine": st.booleans() | st.sampled_from(["true", "False"]),
    },
    "12_quantization_grids": {
        "low": st.lists(st.sampled_from(["3-8-4", "2-8-16"]), unique=True),
        "cache_bits": st.just("8-16-2"),
    },
}


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
@pytest.mark.parametrize("notebook", VALUES)
def test_what_passes_makes_arms_that_json_holds(notebook, data):
    values = {name: data.draw(kind, label=name) for name, kind in VALUES[notebook].items()}
    path = PATHS[notebook]
    assigned = batch.assign_parameters([path], {"model": "tiny-random", "profile": "smoke"} | values)[path]
    arms = batch.wanted_arms(path, assigned)
    assert arms and all("Infinity" not in arm.canonical() and "NaN" not in arm.canonical() for arm in arms)
    for arm in arms:
        METHODS[arm.method].check(arm)
    again = dict(assigned)
    check_parameters(notebook, again)
    assert again == assigned
