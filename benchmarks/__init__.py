"""Times, and results beside other optimizers; each module runs as `python -m benchmarks.step_time`."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # LAPACK's threads spin where cores are shared
