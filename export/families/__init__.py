"""What the export does for each family: calibration runs, evaluation, the gate's limits and the report's figure."""
