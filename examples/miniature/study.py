"""A comparison that is fixed before its first training: the question, or ranking by a teacher.

Run it as ``python examples/miniature/study.py``; see the README beside this file.
"""

import sys
import warnings

try:
    from miniature_paper.search.study_command import main
except ModuleNotFoundError as error:
    sys.exit(f"This example needs the module {error.name!r}: pip install -e '.[examples]' -e examples")

if __name__ == "__main__":
    # The trainer's dependencies warn about each other's age, which does not concern a reader.
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    sys.exit(main())
