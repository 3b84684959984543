"""Train every loss on icons, measure, and write the report: see the README beside this file."""

import sys

from miniature_paper.command import main  # needs: pip install -e '.[examples]' -e examples

if __name__ == "__main__":
    sys.exit(main())
