"""The command `moe-harness`: one file per command, `app` puts them together, `options` holds what they share."""
