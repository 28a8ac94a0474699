from . import deciding, figures, front, ledger, page, recipes, tables
from .ledger import CLAIMS
from .tables import frame, scoreboard

__all__ = ["CLAIMS", "deciding", "figures", "frame", "front", "ledger", "page", "recipes", "scoreboard", "tables"]
