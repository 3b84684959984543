"""Build pictures of icons and their names, split by concept: see the README beside this file."""

import sys

try:
    from icons_data.command import main
except ModuleNotFoundError as error:
    sys.exit(f"This example needs the module {error.name!r}: pip install -e '.[examples]' -e examples")

if __name__ == "__main__":
    sys.exit(main())
