"""Decorates our kernels for the interpreter, and only them: dispatch on the CPU stays torch's."""

from interpreter import interpreted, quick

with interpreted():
    import dit_accel.kernels.block_sparse_attention.triton_ends
    import dit_accel.kernels.block_table.triton
    import dit_accel.kernels.int8_attention.triton
    import dit_accel.kernels.norm_rope.triton
    import dit_accel.kernels.pooled_attention.triton
    import dit_accel.kernels.ragged_attention.triton
    import dit_accel.kernels.rectified_attention.triton
    import dit_accel.kernels.sparse_linear_attention.triton
    import dit_accel.kernels.window_attention.triton  # noqa: F401

quick()
