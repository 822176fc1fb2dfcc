"""The evidence in the READMEs, rendered from results/small.json: `nox -s report`, with `-- --check` to compare."""

from __future__ import annotations

import importlib
import json
import sys
import tomllib
from pathlib import Path
from typing import Any

from metazoo import report

ROOT = Path(__file__).resolve().parent.parent


def results_of(folder: Path) -> dict[str, Any] | None:
    """What was measured at the small scale, None if nothing was."""
    path = folder / "results" / "small.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def rendered(root: Path = ROOT) -> dict[Path, str]:
    """Each README of the packages, and the root's, as it should read."""
    texts, packages = {}, []
    for folder in sorted(path.parent for path in root.glob("packages/*/pyproject.toml")):
        results = results_of(folder)
        claims = importlib.import_module(f"{folder.name.replace('-', '_')}.claims").CLAIMS
        readme = folder / "README.md"
        texts[readme] = report.render(
            readme.read_text(encoding="utf-8"),
            results or {"claims": []},
            {claim.name: claim.version for claim in claims},
        )
        packages.append((tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8")), results))
    readme = root / "README.md"
    texts[readme] = report.render_packages(readme.read_text(encoding="utf-8"), packages)
    return texts


def main(arguments: list[str]) -> int:
    """Write or compare; 1 if a README is stale, 2 for other arguments."""
    if arguments not in ([], ["--check"]):
        print(f"unknown arguments {' '.join(arguments)}: give --check or nothing", file=sys.stderr)
        return 2
    stale = [path for path, text in rendered().items() if path.read_text(encoding="utf-8") != text]
    if arguments:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is stale: run `nox -s report`", file=sys.stderr)
        return int(bool(stale))
    for path, text in rendered().items():
        if path in stale:
            path.write_text(text, encoding="utf-8")
        print(f"{path.relative_to(ROOT)}: {'written' if path in stale else 'unchanged'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
