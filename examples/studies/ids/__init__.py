"""CLIP's loss where pairs of a batch belong together: partners as others, left out, or shared."""
