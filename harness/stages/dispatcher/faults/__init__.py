"""Wrong implementations of the stage `dispatcher`."""
