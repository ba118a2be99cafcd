"""Which tokens run, and what stands for those that do not."""
