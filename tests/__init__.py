"""The tests. `support` is what several of them share."""
