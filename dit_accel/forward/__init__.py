"""Where one forward stands: its step, its keys, its token order."""
