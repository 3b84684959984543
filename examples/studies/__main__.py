"""``python -m studies NAME``: do a study's missing trainings, and write its report."""

import os
import sys

if __name__ == "__main__":
    # Before anything is imported that starts threads: sums keep one order, and processes share the cores.
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    from studies.runner import main

    sys.exit(main())
