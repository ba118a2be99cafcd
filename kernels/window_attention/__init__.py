"""Dense attention that also returns the part a window of key blocks has in it."""
