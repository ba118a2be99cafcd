"""What stands inside an accelerated pipeline."""
