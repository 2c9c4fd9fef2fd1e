"""Scripts that measure, their results as JSON, and the tables made from them."""

import os
import sys

from engine.processors import share_processors

if "torch" not in sys.modules:  # it would not read this any more, and what the process starts is not ours
    share_processors(os.environ)  # as `ssdkd` does
os.environ.setdefault("OMP_DYNAMIC", "false")  # the number of threads is the one that a result says
