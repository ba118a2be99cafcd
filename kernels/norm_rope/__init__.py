"""RMS norm of queries and keys over all heads, then their rotary position embedding."""
