"""Block table: the key blocks whose means score highest against each query block's mean."""
