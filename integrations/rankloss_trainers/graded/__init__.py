"""Lists of graded candidates: as data, as a loss beside pairs, and in each trainer."""
