"""Plain PyTorch: `loop` says what the stage means, `grouped_mm` and `batched` are the usual ways to make it fast."""
