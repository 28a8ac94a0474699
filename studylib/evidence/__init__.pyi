from .claims import BY_PAPER, CLAIMS
from .measures import Cell, Measure, gather, measures, of_profile, response_measures
from .verdicts import VERDICTS, Claim, Effect, Finding, PaperNumber, judge

__all__ = [
    "BY_PAPER",
    "CLAIMS",
    "VERDICTS",
    "Cell",
    "Claim",
    "Effect",
    "Finding",
    "Measure",
    "PaperNumber",
    "gather",
    "judge",
    "measures",
    "of_profile",
    "response_measures",
]
