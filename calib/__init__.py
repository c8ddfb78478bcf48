"""Calibration: samples, histograms, ranges, scales, smoothing and quantised weights."""
