"""Calibration front end: a checkpoint in, a :class:`pq_export.calibration.Calibration` out. PyTorch only."""
