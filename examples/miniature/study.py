"""A comparison that is fixed before its first training: see the README beside this file."""

import sys

from miniature_paper.search.command import main  # needs: pip install -e '.[examples]' -e examples

if __name__ == "__main__":
    sys.exit(main())
