"""Parts 2b and 3: heads taught by one teacher with a common space, and by parts of it."""

from . import findings as findings
from . import plan as plan
from . import report as report
from . import study as study
