"""Boundary lists: sizes at which kernels change their path, and the shapes of released models."""

# One off each block multiple a kernel may use, and every small count (a published bug lived only at T in {3, 4}).
TOKENS = (*range(18), 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257)
# Beyond them kernels change tiles, not code; each is met once, on small matrices.
TOKENS_MANY = (384, 511, 512, 513, 768, 1000, 1023, 1024, 1025, 1536, 2047, 2048, 2049, 3000, 8193)
# Where published kernels take another path, or stop: single-block sorts, shared-memory lists, persistent grids.
TOKENS_TURNING = (256, 257, 513, 1409, 2048, 4097)
TOKENS_BEYOND_16_BITS = 65_601  # and no multiple of any tile
TOKENS_FEW = (1, 2, 3, 4, 5, 8, 16, 17, 33, 64, 65, 129)

# (E, k): released models first, then shapes no kernel is tuned for.
RELEASED_EXPERTS = ((8, 2), (60, 4), (128, 8), (512, 10), (64, 6), (256, 8), (32, 4), (128, 4))
ODD_EXPERTS = ((1, 1), (2, 1), (2, 2), (3, 2), (7, 3), (8, 8), (5, 5), (72, 9), (160, 6), (257, 5), (384, 8))
LARGE_K = ((64, 16), (64, 17), (128, 22), (128, 32), (32, 32))  # registers and masks of kernels hold 8, 16 or 32
EXPERTS_MANY = (513, 896, 1025, 1030, 2048)  # one block of threads is at most 1,024; histograms hold 512

WIDTHS = (1, 7, 8, 16, 31, 33, 64, 96, 129, 256)
WIDTHS_FULL = (*WIDTHS, 2, 3, 5, 15, 17, 24, 32, 48, 63, 65, 100, 127, 128, 160, 192, 255, 257, 384, 513)
INNER = (1, 5, 8, 16, 24, 32, 63, 64, 96, 130)
INNER_FULL = (*INNER, 2, 3, 7, 17, 31, 33, 48, 65, 127, 128, 129, 192, 256, 257)

WIDTHS_BEYOND_4096 = (4097, 5120, 7168, 8192)

LAYOUTS_OF_ONE = ("unit", "padded", "strided", "outer_padded", "transposed")  # where a dimension of size 1 may mislead
LAYOUTS = ("padded", "offset", "strided", "transposed", "outer_padded", "expanded", "unit")
