"""Data sets of pictures and captions: emojis, icons, photographs; as pixels, words and frozen features."""
