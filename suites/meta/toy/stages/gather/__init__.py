"""The stage `gather`: rows of all ranks, of rank 0 first."""
