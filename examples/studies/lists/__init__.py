"""Losses of graded lists compared on people's grades of captions and on emojis graded by a rule."""
