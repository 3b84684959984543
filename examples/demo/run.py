"""Train a small CLIP on emojis and evaluate it on others: see the README beside this file."""

import sys
import warnings

if __name__ == "__main__":
    # Deprecations between the trainer's dependencies are of no use to a reader of the demo.
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    from openmoji_demo.command import main  # needs: pip install -e '.[examples]' -e examples

    sys.exit(main())
