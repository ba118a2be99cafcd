"""Rectified attention (arXiv 2511.19835): O = r · O_sparse + C from pooled attention."""
