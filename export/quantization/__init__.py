"""Quantisation: from FP32 graphs and calibration data to integer graphs whose accuracy was measured."""
