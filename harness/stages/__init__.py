"""The stages: a folder for each, with all that the harness knows of it."""
