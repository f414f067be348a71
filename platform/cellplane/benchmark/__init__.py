"""Side-by-side measurements: each prints JSON lines and a table."""
