"""The page: two configurations side by side from the same noise. See docs/start/app.md."""
