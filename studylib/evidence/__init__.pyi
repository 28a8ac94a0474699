from .measures import Cell, Measure, gather, measures, of_profile, response_measures
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
    "measures",
    "of_profile",
    "response_measures",
]
