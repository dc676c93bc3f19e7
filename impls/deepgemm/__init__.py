"""DeepGEMM's grouped products, from the package deep_gemm.  Used where installed."""
