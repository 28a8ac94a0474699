"""What a person is shown while something runs: lines, and bars of tqdm."""

import os
import sys
import warnings
from typing import Any

AS_TEXT = {"STUDY_PROGRESS": "text"}  # in the environment: bars are text, and never widgets


def tell(message: str) -> None:
    """Print the line "study: message" to stderr, above a progress bar where there is one."""
    from tqdm import tqdm  # not for those who are told nothing

    tqdm.write(f"study: {message}", file=sys.stderr)


def progress_bar(**options: Any) -> Any:
    """A bar of tqdm with these options: in Jupyter a widget, where ipywidgets is installed, else text on stderr.

    It is text as well with STUDY_PROGRESS=text, as in notebooks that `study run` executes: their bar is on a terminal.
    """
    if os.environ.items() >= AS_TEXT.items():
        from tqdm import tqdm
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that widgets are experimental, or that there are none
            from tqdm.auto import tqdm
    return tqdm(**options)
