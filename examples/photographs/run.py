"""RankCLIP and plain CLIP on photographs, and people's grades: see the README beside this file."""

import sys

from photostudy.command import main  # needs: pip install -e '.[examples]' -e 'examples[photographs]'

if __name__ == "__main__":
    sys.exit(main())
