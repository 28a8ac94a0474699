"""The golden values of the components are computed by a module of their folder, which is imported here."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))
