"""The figures: one function each, drawn from records alone; titles are computed from the numbers.

What is offered here is listed in __init__.pyi, and imported when it is asked for.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
