"""Bit widths, grids, formats, adapters: frozen values that refuse what makes no sense."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from studylib.config.settings import FLOATS, GRIDS, INTEGER_FORMATS, Adapter, BitWidths, Format, Grid, Scheme

BITS = range(2, 9)
ALL = [
    *(Format("nf", bits) for bits in (2, 3, 4)),
    *(Format(kind) for kind in FLOATS),
    *(Format(kind, bits) for kind in INTEGER_FORMATS for bits in (2, 3, 4, 8)),
]
VARIANTS = [*ALL, *(dataclasses.replace(format, double=True) for format in ALL)]
VARIANTS += [dataclasses.replace(format, group=None) for format in ALL]
VARIANTS += [dataclasses.replace(format, scale_bits=16) for format in ALL]


BAD_WIDTHS = ["4-8", "4-8-4-4", "a-8-4", "", "1-8-4", "4-9-4", "4-8-17", "4-0-4", "04-8-4", "٤-8-4", 484]


@pytest.mark.parametrize("text", BAD_WIDTHS)
def test_bad_bit_widths_name_the_value(text):
    with pytest.raises(ValueError) as caught:
        BitWidths.parse(text)
    assert "\n" not in str(caught.value)
    assert any(part in str(caught.value) for part in str(text).split("-") if part) or repr(text) in str(caught.value)


@given(st.tuples(*[st.sampled_from([*BITS, 16])] * 3))
def test_bit_widths_round_trip(bits):
    assert str(BitWidths.parse("-".join(map(str, bits)))) == "-".join(map(str, bits))


@pytest.mark.parametrize(
    "arguments",
    [
        {"bits": 1},
        {"bits": 9},
        {"bits": 16},
        {"bits": True},
        {"bits": 4, "group": 0},
        {"bits": 4, "group": 2.5},
        {"bits": 4, "kind": "minmax"},
    ],
)
def test_bad_grids_are_refused(arguments):
    with pytest.raises(ValueError, match=r"use|needs"):
        Grid(**arguments)


def test_titles():
    assert [format.title for format in ALL[:7]] == [
        "NF2",
        "NF3",
        "NF4",
        "FP4 (E2M1)",
        "FP4 (bitsandbytes)",
        "FP4 (E3M0)",
        "Int2",
    ]
    assert Format("nf", 3, 32).title == "NF3, groups of 32"
    assert Format("nf", double=True).title == "NF4 + DQ"
    assert Format("int-full", 3, 128).title == "full-range Int3, groups of 128"
    assert Format("affine", group=None, scale_bits=16).title == "affine Int4, per channel, 16-bit scales"
    assert len({format.title for format in VARIANTS}) == len(VARIANTS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"kind": "nf5"},
            "format: 'nf5' is not known; use one of nf, fp-e2m1, fp-bnb, fp-e3m0, mxfp4",
        ),
        ({"kind": "nf", "bits": 5}, "bits: 5 is not allowed for 'nf'; use 2 or 3 or 4"),
        ({"kind": "nf", "bits": 4.0}, "bits: 4.0 is not allowed for 'nf'; use 2 or 3 or 4"),
        ({"kind": "nf", "bits": 8}, "bits: 8 is not allowed for 'nf'; use 2 or 3 or 4"),
        ({"kind": "fp-e2m1", "bits": 3}, "bits: 3 is not allowed for 'fp-e2m1'; use 4"),
        ({"kind": "int", "bits": 1}, "bits: 1 is not allowed for 'int'; use 2 or 3 or 4 or 8"),
        (
            {"kind": "nf", "group": 0},
            "group: 0 is not allowed; use a whole number from 1 to 65536, or None",
        ),
        ({"kind": "nf", "group": True}, "group: True is not allowed"),
        ({"kind": "nf", "scale_bits": 8}, "scale_bits: 8 is not allowed; use 16 or 32"),
        ({"kind": "nf", "scale_bits": 32.0}, "scale_bits: 32.0 is not allowed"),
        ({"kind": "nf", "double": "false"}, "double: 'false' is not allowed; use True or False"),
        ({"kind": "nf", "group": 2**20}, "group: 1048576 is not allowed"),
        ({"kind": "nf", "group": None, "double": True}, "double: True is not allowed with group None"),
        ({"kind": "nf", "scale_bits": 16, "double": True}, "double: True is not allowed with group 64 and scale_bits"),
    ],
)
def test_bad_formats_name_the_value_and_what_is_allowed(arguments, message):
    with pytest.raises(ValueError) as caught:
        Format(**arguments)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "rank: 0 is not allowed; use a whole number from 1 to 1024"),
        ({"rank": 2.0}, "rank: 2.0 is not allowed"),
        ({"alpha": 0}, "alpha: 0 is not allowed; use a number above 0"),
        ({"alpha": math.inf}, "alpha: inf is not allowed"),
        ({"dropout": 1.0}, "dropout: 1.0 is not allowed; use a share from 0 to below 1"),
        ({"kind": "vera"}, "kind: 'vera' is not known; use one of lora, dora, pissa, loftq"),
        ({"init": "zeros"}, "init: 'zeros' is not known; use one of"),
        ({"rank": 2000}, "rank: 2000 is not allowed; use a whole number from 1 to 1024"),
        ({"alpha": True}, "alpha: True is not allowed"),
        ({"alpha": "16"}, "alpha: '16' is not allowed"),
        ({"dropout": math.nan}, "dropout: nan is not allowed"),
        ({"kind": ["lora"]}, r"kind: \['lora'\] is not known"),
        ({"layers": ""}, "layers: '' is not allowed; use 'all', or ends of layers' names"),
        ({"layers": "q_proj+q_proj"}, r"layers: 'q_proj\+q_proj' is not allowed"),
        ({"layers": ("q_proj",)}, r"layers: \('q_proj',\) is not allowed"),
    ],
)
def test_adapters_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Adapter(**fields)


def test_schemes_that_make_no_sense_are_refused():
    for arguments, named in (
        ({"grid": "minmax"}, "'minmax' is not known; use one of symmetric, asymmetric"),
        ({"cache_scale": "layer"}, "'layer' is not known"),
        ({"keys": "rotated"}, "'rotated' is not known"),
    ):
        with pytest.raises(ValueError, match=named):
            Scheme(**arguments)


def test_levels_of_a_grid():
    assert (Grid(4).low, Grid(4).high, Grid(4, "asymmetric").low, Grid(4, "asymmetric").high) == (-7, 7, 0, 15)
    assert (Grid(2, "lsq").low, Grid(8, "statsq").high) == (-1, 127)
    assert Format("affine", 3, 32).grid == Grid(3, "asymmetric", 32) and Format("int", 8, None).grid == Grid(8)


def test_full_range_grids_have_a_level_more_below_zero():
    for bits in BITS:
        assert (Grid(bits, "full-range").low, Grid(bits, "full-range").high) == (
            -(2 ** (bits - 1)),
            2 ** (bits - 1) - 1,
        )
    assert Format("int-full", 3, 32).grid == Grid(3, "full-range", 32) and Grid(4, "full-range").symmetric


def test_activations_and_cache_beside_a_grid_of_weights_are_symmetric():
    assert {grid: Scheme(grid).on_the_fly for grid in GRIDS} == {
        "symmetric": "symmetric",
        "asymmetric": "asymmetric",
        "full-range": "full-range",
        "statsq": "symmetric",
        "lsq": "symmetric",
        "paretoq": "symmetric",
    }


def test_activations_and_cache_can_have_another_grid_than_the_weights():
    for grid, beside in (("lsq", "asymmetric"), ("symmetric", "full-range"), ("asymmetric", "symmetric")):
        assert Scheme(grid, activations=beside).on_the_fly == beside
    for grid, beside, said in (
        ("lsq", "symmetric", "'symmetric' is what the grid 'lsq' has; leave it out"),
        ("asymmetric", "asymmetric", "'asymmetric' is what the grid 'asymmetric' has; leave it out"),
        ("nvfp", "asymmetric", "'asymmetric' does not go with the floats of 'nvfp'; leave it out"),
        ("symmetric", "lsq", "'lsq' is not known; use one of symmetric, asymmetric, full-range"),
    ):
        with pytest.raises(ValueError, match=f"^activations: {said}$"):
            Scheme(grid, activations=beside)


def test_a_group_has_to_divide_a_row():
    for one in (Grid(4, group=48), Format("nf", group=48)):
        one.check_width(96)
        with pytest.raises(ValueError, match=r"^group: 48 does not divide the row length 64$"):
            one.check_width(64)


def test_an_adapter_is_scaled_by_alpha_over_rank():
    assert Adapter(4, 16).scaling == 4 and Adapter().scaling == 1
