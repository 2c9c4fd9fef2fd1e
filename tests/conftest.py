import os

# Workers share the cores: OpenMP threads of each, which spin while they wait, would take them from the others.
# Read when PyTorch is first imported, here and in what the tests start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
