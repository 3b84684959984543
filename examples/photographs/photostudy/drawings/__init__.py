"""Part 2c: the weights of two encoders without a common space, searched on emojis and icons.

``data`` has both data sets, ``plan`` the tries, which are scored on both together, ``study`` the trainings,
``findings`` and ``report`` the tests and the page.
"""

from . import data as data
from . import findings as findings
from . import plan as plan
from . import report as report
from . import study as study
