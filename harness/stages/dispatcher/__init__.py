"""The stage `dispatcher`: tokens sent to the ranks of their experts, and back."""
