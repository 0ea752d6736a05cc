"""Kernels that fuse into a tensor-core matmul; imported only when used."""
