"""Where the tests find the checkout, their own folder, and the bundles that earlier versions wrote."""

from __future__ import annotations

import os
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
REPO = Path(os.environ.get("TRANSOM_REPO") or TESTS.parent)
KEPT = TESTS / "bundles" / "0.1.0"  # small ones, of each family and precision
FP32 = sorted(path for path in KEPT.glob("*-fp32*") if not path.name.endswith("-native"))  # one of each form
