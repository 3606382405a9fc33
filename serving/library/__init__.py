"""Libraries over HTTP: documents that are read once, and questions to all of them."""
