"""Part 2a: students from scratch, taught by two frozen encoders without a common space."""

from . import data as data
from . import plan as plan
from . import report as report
from . import study as study
from . import train as train
