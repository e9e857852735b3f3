"""What `softmoe compare` forks its drawing processes from imports this: all that they need, and no garbage collection,
which would take a twentieth of their time and free nothing that their end does not."""

import gc
from importlib import import_module

gc.disable()
BACKENDS = ("matplotlib.backends.backend_svg", "matplotlib.backends.backend_pdf", "fontTools.subset")
for _name in ("softmoe_cli.figures", *BACKENDS):
    import_module(_name)
