"""Parameters, the state of a sequence, and the ops on it."""
