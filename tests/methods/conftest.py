"""What the tests of this folder share is a module beside them, attached.py, which they import."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
