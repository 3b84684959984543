"""Build pictures of icons and their names, split by concept: ``python -m studies.icons``."""

import sys

from studies.icons.command import main

if __name__ == "__main__":
    sys.exit(main())
