"""Make src/metacluster/mnist14.npz from MNIST: `python official_mnist14.py --data-dir FOLDER --output FILE`.

8 000 of the 60 000 training images and 2 000 of the 10 000 test images, as many of each digit, drawn with seed 0; 2 x 2
means, rounded. FOLDER holds train.parquet and test.parquet in the schema of ylecun/mnist.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from metacluster.data import IMAGES, _read_parquet


def drawn(path: Path, count: int) -> tuple[np.ndarray, np.ndarray]:
    """``count`` images at 14 x 14 and their labels, in a fixed random order."""
    images, labels = _read_parquet(path, IMAGES["mnist"])
    rng = np.random.default_rng(0)
    chosen = np.concatenate([rng.permutation(np.flatnonzero(labels == digit))[: count // 10] for digit in range(10)])
    chosen = rng.permutation(chosen)
    small = images[chosen, 0].reshape(-1, 14, 2, 14, 2).astype(np.float64).mean((2, 4))
    return np.round(small).astype(np.uint8), labels[chosen].astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("mnist14.npz"))
    options = parser.parse_args()
    x_train, y_train = drawn(options.data_dir / "train.parquet", 8000)
    x_test, y_test = drawn(options.data_dir / "test.parquet", 2000)
    np.savez_compressed(options.output, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    print(f"{options.output}: {options.output.stat().st_size} bytes")


if __name__ == "__main__":
    main()
