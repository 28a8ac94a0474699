"""Where trainings are told of beside their records: trackers that may be there or not, known without loading them."""

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

from studylib.config.values import check_known

REPORT_TO = "STUDY_REPORT_TO"
TRACKERS = {"tensorboard": ("tensorboard", "tensorboardX"), "mlflow": ("mlflow",), "wandb": ("wandb",)}  # any of these


@dataclass(frozen=True)
class Report:
    """Where one training is told of: the names of trackers, a folder for what they write, and what the run is called.
    None of it is in the training's result."""

    trackers: tuple[str, ...] = ()
    folder: Path = Path()
    run: str = ""


UNREPORTED = Report()


def wanted_trackers() -> tuple[str, ...]:
    """Those that STUDY_REPORT_TO names, with commas between them. ValueError for one that is not known, or missing."""
    names = tuple(filter(None, map(str.strip, os.environ.get(REPORT_TO, "").split(","))))
    for name in names:
        check_known(REPORT_TO, name, TRACKERS)
        if not any(importlib.util.find_spec(package) for package in TRACKERS[name]):
            raise ValueError(f"{REPORT_TO}: {name} is not installed; use pip install {TRACKERS[name][0]}")
    return names
