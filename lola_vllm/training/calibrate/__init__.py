"""How many sparse pairs each layer of a model should have, measured on plain text."""
