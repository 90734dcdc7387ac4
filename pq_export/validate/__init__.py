"""Proof that a bundle is what calibration simulated, and measurements of what it costs."""
