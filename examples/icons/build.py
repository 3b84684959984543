"""Build pictures of icons and their names, split by concept: see the README beside this file."""

import sys

from icons_data.command import main  # needs: pip install -e '.[examples]' -e examples

if __name__ == "__main__":
    sys.exit(main())
