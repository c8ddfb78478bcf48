"""Run Transom on emulated processors: ``make test-arm`` and ``make test-x86``; docs/processors.md says more."""
