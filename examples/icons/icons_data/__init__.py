"""Image–name pairs from Iconify's icon sets: the parts behind ``examples/icons/build.py``."""
