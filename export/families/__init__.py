"""The export's side of each family: calibration runs, evaluation, the gate's limits and the report's figure."""
