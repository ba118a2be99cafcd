"""Block-sparse attention in eight bits, for inference."""
