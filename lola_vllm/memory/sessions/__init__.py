"""Stored states. Names and settings load no torch: commands that ask a server start at once."""
