"""Make src/mambacl/omniglot20.npz: `python official_omniglot20.py --data-dir FOLDER --output FILE`.

The 242 distinct characters of Omniglot's two small sets at 20 x 20, 20 drawings each, as mambacl.data reads them.
FOLDER holds images_background_small1.zip and images_background_small2.zip of brendenlake/omniglot, python/.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from mambacl.data import _omniglot


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--output", type=Path, default=Path("omniglot20.npz"))
    options = parser.parse_args()
    table = _omniglot(options.data_dir, 20)
    np.savez_compressed(options.output, x=table.x[:, 0], y=table.y.astype(np.int16), names=np.array(table.names))
    print(f"{options.output}: {len(table.names)} characters, {options.output.stat().st_size} bytes")


if __name__ == "__main__":
    main()
