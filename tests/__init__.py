"""The tests. Their folders mirror those of the package."""

import os

# The networks in the tests are so small that several threads would only wait for each other: on a busy machine, ten
# times as long as the work takes. Set this before PyTorch is imported. Processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
