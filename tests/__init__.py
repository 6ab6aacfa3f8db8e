"""The tests, laid out as the package is."""

import os

# The networks here are so small that threads would only wait for each other: on a busy machine, ten times as
# long as the work itself takes. Set before PyTorch is imported, and inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
