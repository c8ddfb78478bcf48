"""What a model's ranges are: the room for INT8 calibration. Nothing lives here yet."""
