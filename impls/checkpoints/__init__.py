"""Released checkpoints, their tensors turned into the form that the kernels take."""
