"""transformers' own modules, driven through their real code with the caller's tensors.

A module is built on the meta device, so nothing is allocated, and then given the caller's tensors as they are.  Nothing
is kept between calls.  Where the real code does not do what the stage asks, the call is refused with the reason.  What
is translated at the boundary is only the convention in which transformers' own modules call each other.
"""
