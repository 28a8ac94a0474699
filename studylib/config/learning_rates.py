"""Learning rates: chosen for a model and a budget by a search on validation text (study.rates), and read back."""

import functools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any

from studylib.config.values import check_positive, check_share, shown


@dataclass(frozen=True)
class Rate:
    """learning_rate: of adapters or weights. grid_rate: of learned scales and offsets (see Budget), where there are."""

    learning_rate: float
    grid_rate: float | None = None

    def __post_init__(self) -> None:
        check_positive("learning_rate", self.learning_rate)
        if self.grid_rate is not None:
            check_share("grid_rate", self.grid_rate)

    @property
    def text(self) -> str:
        """In words: "0.001, 0.01 for its grid"."""
        return f"{self.learning_rate:g}" + ("" if self.grid_rate is None else f", {self.grid_rate:g} for its grid")


@functools.cache
def _committed() -> dict[tuple[str, str], dict[str, Rate]]:
    found, folder = {}, resources.files(__package__).joinpath("rates")
    for file in folder.iterdir() if folder.is_dir() else ():
        if file.name.endswith(".json"):
            model, profile, rates = parse_rates(file.read_text(encoding="utf-8"), file.name)
            found[model, profile] = rates
    return found


def find_rates(model: str, profile: str, file: str = "") -> dict[str, Rate]:
    """The rates of a file that `study rates` wrote, or those that come with studylib for this model and profile; {}
    where there are none, and each method's usual one is taken. Raises ValueError for a file that is none, or that was
    written for another model or profile."""
    if not file:
        return dict(_committed().get((model, profile), {}))
    try:
        with open(os.path.expanduser(file), encoding="utf-8") as opened:
            own_model, own_profile, rates = parse_rates(opened.read(), file)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"rates: {file!r} cannot be read ({error})") from error
    if own_model not in (model, os.path.realpath(model)) or own_profile != profile:
        raise ValueError(
            f"rates: {file!r} was written for {shown(own_model)} at {shown(own_profile)}, not for {model} at {profile}"
        )
    return rates


def find_family_rates(models: Sequence[str], profile: str, files: Sequence[str] = ()) -> dict[str, dict[str, Rate]]:
    """By model, what `find_rates` gives with the file of the same place; without files, what comes with studylib.
    Raises ValueError as it does, and where there are as many files as models neither, nor none."""
    if files and len(files) != len(models):
        raise ValueError(f"rates: {len(files)} files for {len(models)} models; use one file for each, or none")
    return {
        model: find_rates(model, profile, file) for model, file in zip(models, files or [""] * len(models), strict=True)
    }


def parse_rates(text: str, name: str) -> tuple[str, str, dict[str, Rate]]:
    """Model, profile and the rate of each setting, from the text of a file. ValueError for another text."""
    try:
        fields = json.loads(text)
        rates = {setting: Rate(**given) for setting, given in fields["rates"].items()}
        return fields["model"], fields["profile"], rates
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"rates: {shown(name)} holds no rates as `study rates` writes them ({error})") from error


def rates_text(model: str, profile: str, rates: Mapping[str, Rate]) -> str:
    """What `parse_rates` reads."""
    fields: dict[str, Any] = {"model": model, "profile": profile}
    fields["rates"] = {setting: asdict(rate) for setting, rate in sorted(rates.items())}
    return json.dumps(fields, indent=1) + "\n"
