"""Plain PyTorch kernels: the reference of the other sets, and the default on a CPU."""
