"""Training of maps and adapters, and calibration of caches."""
