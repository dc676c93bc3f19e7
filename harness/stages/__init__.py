"""The stages, a folder for each with all that the harness knows of it; see "A stage" in CONTRIBUTING.md."""

from moe_harness.harness.core.registry import extra_folders

__path__ += [str(folder) for folder in extra_folders("stages")]
