"""In-batch ranking by ordered ids compared with CLIP's loss; the README has the rest."""

import sys

from orderstudy.command import main

if __name__ == "__main__":
    sys.exit(main())
