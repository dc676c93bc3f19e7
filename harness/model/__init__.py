"""Judging whole decoders: noise of every rounding a model may do, and what follows for its logits."""
