"""The stage `grouped_linear`: one product a group of rows."""
