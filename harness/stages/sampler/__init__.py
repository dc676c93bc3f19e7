"""The stage `sampler`: the next token, likeliest or drawn."""
