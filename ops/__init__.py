"""What is computed: stateless ops, each with a plain-PyTorch reference beside it, in kernel sets of the same names."""
