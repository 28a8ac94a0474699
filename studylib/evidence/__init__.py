"""From records to verdicts: measures, intervals, rules, and the claims of the three papers and of later work.

What other wings may use is listed in __init__.pyi, and imported when it is asked for.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
