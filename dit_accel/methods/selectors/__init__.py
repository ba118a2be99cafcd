"""Ways to choose the key blocks a query block reads, beyond the K best by mean score (ops)."""
