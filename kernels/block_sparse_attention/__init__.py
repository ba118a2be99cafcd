"""Block-sparse attention: softmax attention to the key blocks of a table."""
