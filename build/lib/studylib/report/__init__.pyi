from . import deciding, figures, ledger, page, recipes, tables
from .ledger import CLAIMS
from .tables import frame, scoreboard

__all__ = ["CLAIMS", "deciding", "figures", "frame", "ledger", "page", "recipes", "scoreboard", "tables"]
