"""What torch calls at import (placeholder until the finder lands)."""


def attach() -> None:
    """Do nothing yet."""
