"""The captions as teacher, and rivals that need nothing but pairs."""
