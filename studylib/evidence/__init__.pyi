from .measures import Cell, Measure, gather, of_profile, response_measures
from .verdicts import VERDICTS, Claim, Effect, Finding, PaperNumber, judge

__all__ = [
    "VERDICTS",
    "Cell",
    "Claim",
    "Effect",
    "Finding",
    "Measure",
    "PaperNumber",
    "gather",
    "judge",
    "of_profile",
    "response_measures",
]
