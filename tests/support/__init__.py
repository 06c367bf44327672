"""What tests are made of: models, fakes, servers, machines."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The checkout."""
PYTHONPATH = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH")]))
"""For processes of their own: the package of this checkout, and what tests are made of."""
