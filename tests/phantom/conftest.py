"""`data/phantom` is a folder of scripts, not a package: its modules import each other as siblings."""

import sys
from pathlib import Path

PHANTOM = Path(__file__).resolve().parents[2] / "data" / "phantom"
if str(PHANTOM) not in sys.path:
    sys.path.insert(0, str(PHANTOM))
