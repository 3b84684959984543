"""Fine-tuning with and without the starting checkpoint as teacher; the README has the rest."""

import sys

from finetuningstudy.command import main

if __name__ == "__main__":
    sys.exit(main())
