from . import figures, ledger, page, recipes, tables
from .ledger import CLAIMS
from .tables import frame, scoreboard

__all__ = ["CLAIMS", "figures", "frame", "ledger", "page", "recipes", "scoreboard", "tables"]
