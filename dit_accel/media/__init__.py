"""Pictures and clips: files, drawing, how close two of them are."""
