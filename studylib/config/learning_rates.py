"""Learning rates: chosen for a model and a budget by a search on validation text (study.rates), and read back."""

import functools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any

from studylib.config.files import file_sha256
from studylib.config.progress import tell
from studylib.config.values import check_positive, check_share, shown
from studylib.config.words import listed


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


class Rates(dict[str, Rate]):
    """Rates by setting, and what they were chosen on: the SHA-256 of each file of one's own by its name in OWN_DATA,
    none of the profile's data. file: that they were read from, "" of those that come with studylib."""

    def __init__(self, rates: Mapping[str, Rate], chosen_on: Mapping[str, str] = MappingProxyType({}), file: str = ""):
        super().__init__(rates)
        self.chosen_on, self.file = dict(chosen_on), file

    def check(self, own: Mapping[str, str]) -> None:
        """For a training on files `own`, as contents_of has them: ValueError where the rates were chosen on others; a
        line, once, where they come with studylib."""
        if self.chosen_on == own:
            return
        here, there = (listed(sorted(names)) if names else "the profile's data" for names in (own, self.chosen_on))
        if self.file:
            raise ValueError(
                f"rates: {self.file!r} was chosen on {there}, and this is {here}"
                f"{' of other contents' if own.keys() == self.chosen_on.keys() else ''}; choose anew, by `study rates`"
            )
        _tell_once(f"the learning rates were chosen on {there}, and this is {here} of your own; --rates search chooses "
                   "them on it")  # fmt: skip


@functools.cache
def _tell_once(line: str) -> None:
    tell(line)


def contents_of(files: Mapping[str, str]) -> dict[str, str]:
    """The SHA-256 of each file, by the same name. ValueError for one that cannot be read."""
    try:
        return {name: file_sha256(Path(file)) for name, file in files.items()}
    except OSError as error:
        raise ValueError(f"{error.filename}: {error.strerror}") from error


@functools.cache
def _committed() -> dict[tuple[str, str], Rates]:
    found, folder = {}, resources.files(__package__).joinpath("rates")
    for file in folder.iterdir() if folder.is_dir() else ():
        if file.name.endswith(".json"):
            model, profile, rates = parse_rates(file.read_text(encoding="utf-8"), file.name)
            found[model, profile] = rates
    return found


def find_rates(model: str, profile: str, file: str = "") -> Rates:
    """The rates of a file that `study rates` wrote, or those that come with studylib for this model and profile; {}
    where there are none, and each method's usual one is taken. Raises ValueError for a file that is none, or that was
    written for another model or profile."""
    if not file:
        known = _committed().get((model, profile), Rates({}))
        return Rates(known, known.chosen_on)  # of its own, and of no file
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


def find_family_rates(models: Sequence[str], profile: str, files: Sequence[str] = ()) -> dict[str, Rates]:
    """By model, what `find_rates` gives with the file of the same place; without files, what comes with studylib.
    Raises ValueError as it does, and where there are as many files as models neither, nor none."""
    if files and len(files) != len(models):
        raise ValueError(f"rates: {len(files)} files for {len(models)} models; use one file for each, or none")
    return {
        model: find_rates(model, profile, file) for model, file in zip(models, files or [""] * len(models), strict=True)
    }


def parse_rates(text: str, name: str) -> tuple[str, str, Rates]:
    """Model, profile and the rate of each setting, from the text of the file `name`. ValueError for another text."""
    try:
        fields = json.loads(text)
        rates = {setting: Rate(**given) for setting, given in fields["rates"].items()}
        return fields["model"], fields["profile"], Rates(rates, fields.get("chosen_on", {}), name)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"rates: {shown(name)} holds no rates as `study rates` writes them ({error})") from error


def rates_text(
    model: str, profile: str, rates: Mapping[str, Rate], chosen_on: Mapping[str, str] = MappingProxyType({})
) -> str:
    """What `parse_rates` reads. chosen_on: as of Rates; nothing is written of the profile's data."""
    fields: dict[str, Any] = {"model": model, "profile": profile}
    fields |= {"chosen_on": dict(chosen_on)} if chosen_on else {}
    fields["rates"] = {setting: asdict(rate) for setting, rate in sorted(rates.items())}
    return json.dumps(fields, indent=1) + "\n"
