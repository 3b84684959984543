"""Evaluate any CLIP-like model of open_clip: see the README beside this file."""

import sys

from clip_evaluation.command import main  # needs: pip install -e '.[examples]' -e examples

if __name__ == "__main__":
    sys.exit(main())
