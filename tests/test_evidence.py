"""What the READMEs show is what was measured, by the claims as they stand, from a clean tree."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

import pytest
from house import PACKAGES, ROOT, Distribution, every_package
from metazoo.claims import Claim, verdict
from readmes import rendered

AS_CLAIMED = (
    "version", "source", "statement", "paper", "metric", "compare", "treatment", "baseline", "margin", "tolerance",
    "better", "flagship", "chance",
)  # fmt: skip


def claims_of(package: Distribution) -> dict[str, Claim]:
    return {claim.name: claim for claim in importlib.import_module(f"{package.module}.claims").CLAIMS}


@pytest.mark.parametrize("folder", [".", *(f"packages/{p.name}" for p in PACKAGES)])
def test_readme_shows_the_results(folder: str) -> None:
    """The tables equal what results/small.json renders."""
    path = (ROOT / folder / "README.md").resolve()
    assert path.read_text(encoding="utf-8") == rendered()[path], "stale: run `nox -s report`"


@every_package
def test_claims(package: Distribution) -> None:
    """Names are unique; there is a flagship; each claim has both scales and enough seeds for a verdict."""
    listed = importlib.import_module(f"{package.module}.claims").CLAIMS
    assert len(claims_of(package)) == len(listed)
    assert any(claim.flagship for claim in listed)
    for claim in listed:
        assert {"small", "paper"} <= set(claim.arms), claim.name
        assert claim.seeds >= 5, claim.name


@every_package
def test_results_are_of_these_claims(package: Distribution) -> None:
    """Every claim has its row and every row its claim, with the version, margin and metric of the code.

    A claim that changes without a new version, or a row that is left out, shows here.
    """
    claims, rows = claims_of(package), {row["name"]: row for row in package.results["claims"]}
    assert set(rows) == set(claims)
    for name, row in rows.items():
        assert {key: row[key] for key in AS_CLAIMED} == {key: getattr(claims[name], key) for key in AS_CLAIMED}, name
        assert row["seeds"] == claims[name].seeds, f"{name}: measured with other seeds than planned"
        assert set(row["arms"]) == set(claims[name].arms["small"]), name


@every_package
def test_results_come_from_a_clean_tree(package: Distribution) -> None:
    """No row was measured with uncommitted changes, or outside a repository; it says which device and versions."""
    results = package.results
    assert results["package"] == package.name
    assert results["scale"] == "small"
    assert results["environment"]["device"]
    assert {"python", "torch", "metazoo", f"metazoo-{package.name}"} <= set(results["environment"]["versions"])
    for row in results["claims"]:
        assert row["dirty"] is False, f"{row['name']}: measure again from a clean tree"
        assert row["revisions"], row["name"]


@every_package
def test_verdicts_follow_from_the_values(package: Distribution) -> None:
    """The judge, asked again about the stored values of the seeds, gives the stored effect, interval and verdict."""
    claims = claims_of(package)
    for row in package.results["claims"]:
        if row["task_low"] is None:  # with tasks in a seed the row holds only their means
            baseline = row["arms"][row["baseline"]]["values"] if row["baseline"] else None
            again = verdict(claims[row["name"]], row["arms"][row["treatment"]]["values"], baseline)
            assert row["verdict"] == again.verdict, row["name"]
            for key in ("effect", "low", "high"):
                assert same(row[key], getattr(again, key)), f"{row['name']}: {key}"
        else:
            assert row["verdict"] in ("reproduced", "not reproduced", "inconclusive"), row["name"]


def same(stored: float | None, again: float) -> bool:
    """Equal up to the last digits; JSON has null for an endless interval."""
    return math.isinf(again) if stored is None else math.isclose(stored, again, rel_tol=1e-9, abs_tol=1e-12)


@every_package
def test_plots_are_there(package: Distribution) -> None:
    """The README's pictures exist, and the forest plot of the results is among them."""
    assert (package.folder / "results" / "small.png").read_bytes().startswith(b"\x89PNG")
    missing = [path for path in pictures(package.readme) if not (package.folder / path).is_file()]
    assert not missing


def pictures(markdown: str) -> list[Path]:
    """Local pictures that a Markdown text shows."""
    import re

    found: list[Any] = re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", markdown)
    return [Path(target) for target in found if "://" not in target]
