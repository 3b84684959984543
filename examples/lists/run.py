"""Losses of graded lists compared; the README has the rest."""

import sys

from liststudy.command import main

if __name__ == "__main__":
    sys.exit(main())
