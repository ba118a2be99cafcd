"""Sparse-linear attention: exact softmax on the critical blocks, linear attention on the others."""
