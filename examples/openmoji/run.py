"""Train a small CLIP on emojis and evaluate it on others: see the README beside this file."""

import sys
import warnings

if __name__ == "__main__":
    # The trainer's dependencies warn about each other's age, which does not concern a reader.
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    from openmoji_demo.command import main  # needs: pip install -e '.[examples]' -e examples

    sys.exit(main())
