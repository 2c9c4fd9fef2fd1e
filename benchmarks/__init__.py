"""Scripts that measure, their results as JSON, and the tables made from them."""

import os

from engine.processors import share_processors

share_processors(os.environ)  # as `ssdkd` does, before any of them imports PyTorch
