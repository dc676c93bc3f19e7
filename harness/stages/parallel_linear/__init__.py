"""The stage `parallel_linear`: linear layers cut over ranks."""
