"""A comparison that is fixed before its first training: see the README beside this file."""

import sys

try:
    from miniature_paper.search.command import main
except ModuleNotFoundError as error:
    sys.exit(f"This example needs the module {error.name!r}: pip install -e '.[examples]' -e examples")

if __name__ == "__main__":
    sys.exit(main())
