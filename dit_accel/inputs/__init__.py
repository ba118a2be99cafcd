"""What comes from outside: text, prompts, JSON, tables, fields. One reader for each kind."""
