"""The toy package of these tests must be importable in the fork server's children too."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
