"""Evaluate any CLIP-like model of open_clip: see the README beside this file."""

import sys

try:
    from clip_evaluation.command import main
except ModuleNotFoundError as error:
    sys.exit(f"This example needs the module {error.name!r}: pip install -e '.[examples]' -e examples")

if __name__ == "__main__":
    sys.exit(main())
