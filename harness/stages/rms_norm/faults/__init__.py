"""Wrong implementations of the stage `rms_norm`."""
