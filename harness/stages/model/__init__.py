"""The stage `model`: a whole decoder, from a folder on disk to logits, layers and tokens."""
