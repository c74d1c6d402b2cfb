"""The ``generic`` kernel set: cuBLAS for the matrix products, Triton for everything between them."""
