"""Several devices: one command as several processes, one generation over them."""
