"""Block-sparse attention over tiles of unequal length, and the means of these tiles."""
