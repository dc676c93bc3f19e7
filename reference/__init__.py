"""Pure-PyTorch references, one module per stage, written to be read.

They import only torch, compute in the dtype they are given (pass fp64 for an oracle) and share no code with the
implementations under `impls/`.
"""
