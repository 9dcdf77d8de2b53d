"""Stage: what was found → text, JSON or one HTML page. Nothing here computes what it shows."""
