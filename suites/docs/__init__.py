"""The project's pages: what they show of the command's output is the command's output."""
