"""Tables, figures, the recommendation, the ledger and the page.

What other wings may use is listed in __init__.pyi, and imported when it is asked for.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
