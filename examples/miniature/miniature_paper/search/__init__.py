"""The search for a setting in which the rank terms help most: on the validation side, confirmed once."""
