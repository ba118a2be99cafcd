"""What a browser shows of results: tables, charts, report.html."""
