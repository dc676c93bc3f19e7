"""The stage `paged_attention`: causal attention over keys and values that lie in pages."""
