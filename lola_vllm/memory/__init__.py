"""States that outlive a request: sessions, and documents that a question finds."""
