"""Sessions over HTTP: to manage them, and to go on with one by sending the new part only."""
