"""Documents that were read apart, and which of them a question is about."""
