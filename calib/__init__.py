"""What a model's ranges are: calibration data, histograms, scales, smoothing."""
