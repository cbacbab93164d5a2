"""One thread per process: tests are tiny, and threads of several processes wait for each other."""

import os

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before torch is imported; child processes inherit it
