"""Pooled attention: exact on the kept blocks, one mean key and value for each skipped block."""
