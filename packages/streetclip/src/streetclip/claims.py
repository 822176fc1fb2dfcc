"""StreetCLIP's claims as code. Margins, seeds and metrics were set before the claims were measured.

A seed decides the world with its held-out places, the initialisation and the order of photos. `tuning` counts trials at
seeds from 100 on, that is on other worlds: three rates for each trained arm, four where the best was the greatest
(benchmarks/tuning.py), and pilots.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from metazoo.claims import Claim

from streetclip.config import COUNTRY_CAPTION, FULL_CAPTION, PRESETS, RADII, Config, OracleOptions

# % of photos within 1, 25, 200, 750, 2500 km with the true country known and the best of its K most populous cities
CEILINGS = {
    "im2gps3k": {
        1: (4.4, 25.3, 38.9, 66.9, 87.7), 10: (8.4, 44.4, 70.1, 93.6, 98.6), 30: (11.9, 58.9, 84.6, 98.0, 98.8),
        100: (16.5, 68.2, 91.6, 99.5, 100.0), 0: (26.1, 84.8, 99.5, 99.9, 100.0),
    },
    "im2gps": {1: (2.1, 22.8, 38.8, 71.3, 88.2), 30: (9.7, 56.1, 83.5, 96.2, 99.6)},
}  # fmt: skip
GROUPS = ("seen", "unseen_cities", "unseen_countries")


CACHE_VARIABLE = "METAZOO_CACHE"  # folder of the first phase's CLIPs [default: ~/.cache/metazoo]
_SOURCES = ("config", "contrastive", "data", "model", "train", "world")


def start_of(config: Config, seed: int) -> Path:
    """Folder of the tiny CLIP after the first phase, which all arms of a seed share: it is trained once, and kept.

    Another seed, setting or version of the code or of torch is another CLIP.

    Raises:
        UserError: the cache folder cannot be written into.
    """
    import hashlib
    import json
    import os

    import filelock
    import torch
    import transformers
    from metazoo.errors import UserError
    from metazoo.options import RunOptions
    from metazoo.runfolder import config_to_dict

    from streetclip.train import train

    shared = (
        "images", "width", "vision_layers", "text_layers", "heads", "patch", "projection", "generic_steps",
        "generic_batch", "generic_lr", "local_words", "weight_decay", "warmup", "clip", "max_scale", "precision",
    )  # fmt: skip
    first = Config(method="clip", seed=seed, test_images=1, **{name: getattr(config, name) for name in shared})
    digest = hashlib.sha256(json.dumps([config_to_dict(first), torch.__version__, transformers.__version__]).encode())
    for name in _SOURCES:
        digest.update(Path(__file__).with_name(f"{name}.py").read_bytes())
    root = Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "metazoo") / "streetclip"
    entry = root / digest.hexdigest()[:32]
    try:
        root.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{entry}.lock"):
            if not (entry / "done").exists():
                again = (entry / "config.json").exists()
                train(first, RunOptions(output_dir=entry, log_every=25, checkpoint_every=200, resume=again))
                (entry / "done").touch()
    except OSError as error:
        raise UserError(
            f"cannot write into {root}: {error.strerror}; set {CACHE_VARIABLE} to a folder that can be written"
        ) from error
    return entry / "model"


def measure(config: Config, seed: int) -> dict[str, Any]:
    """Train one arm, and score it on photos of seen cities, of unseen cities, and of unseen countries.

    The first phase, on generic captions, is that of :func:`start_of`; training goes on as it would in one run.

    Returns:
        What :func:`streetclip.evaluate.score` returns of each group, as GROUP_NAME. Of a CLIP, with soft_, flat_ and
        full_ (cities asked for by the training template) before it, the same by other modes; hierarchical_gain_750, the
        mean over groups of what the hierarchy adds to flat probing within 750 km; ms and flat_ms for a photo's places,
        with captions encoded; unseen_ before within_25, _200, _750 and country_top1, means over both unseen groups;
        seconds_of_training.
    """
    import tempfile
    import time

    import numpy as np
    from metazoo.options import RunOptions

    from streetclip import evaluate
    from streetclip.config import EvaluateOptions
    from streetclip.train import train

    with tempfile.TemporaryDirectory() as scratch:
        started = time.perf_counter()
        options = RunOptions(output_dir=Path(scratch) / "run", log_every=25, checkpoint_every=10**9)
        config = replace(config, seed=seed)
        if config.generic_steps:
            config = replace(config, model=str(start_of(config, seed)), generic_steps=0)
            started = time.perf_counter()
        run = train(config, options)
        seconds = time.perf_counter() - started
    tests = run.data.tests
    features = {name: evaluate.encode(run.clip, photos) for name, photos in tests.items()}
    found: dict[str, Any] = {"seconds_of_training": seconds}
    if run.head is not None:
        for name, photos in tests.items():
            scored = evaluate.score_head(run.head, features[name], photos, run.data.gazetteer)
            found |= {f"{name}_{metric}": value for metric, value in scored.summary.items()}
    else:
        ways = {
            "": EvaluateOptions(), "soft_": EvaluateOptions(mode="soft"), "flat_": EvaluateOptions(mode="flat"),
            "full_": EvaluateOptions(city_template=FULL_CAPTION),
        }  # fmt: skip
        if not all(run.data.gazetteer.regions):
            del ways["full_"]
        for prefix, way in ways.items():
            locator = evaluate.geolocator_of(run, run.data.gazetteer, way)
            for name, photos in tests.items():
                scored = evaluate.score(locator, features[name], photos)
                found |= {f"{prefix}{name}_{metric}": value for metric, value in scored.summary.items()}
            if prefix in ("", "flat_"):  # captions are encoded by now
                started = time.perf_counter()
                for held in features.values():
                    locator.locate(held)
                count = sum(len(held) for held in features.values())
                found[f"{prefix}ms"] = 1000 * (time.perf_counter() - started) / count
        found["hierarchical_gain_750"] = float(
            np.mean([found[f"{name}_within_750"] - found[f"flat_{name}_within_750"] for name in tests])
        )
    unseen = [name for name in tests if name != "seen"]
    for metric in ("within_25", "within_200", "within_750", "country_top1"):
        found[f"unseen_{metric}"] = float(np.mean([found[f"{name}_{metric}"] for name in unseen]))
    return found


def measure_ceilings(config: OracleOptions, seed: int) -> dict[str, Any]:
    """Ceilings of IM2GPS or IM2GPS3K; no chance is in them, every seed gives the same.

    Returns:
        ceiling_K_R for each K and radius [%]; deviation, the largest from those in ``CEILINGS`` [points]; headroom, the
        least by which the most populous city of the right country is above what is published for StreetCLIP [points].
    """
    from streetclip import coordinates
    from streetclip.gazetteer import Gazetteer

    _, latitude, longitude = coordinates.read_coordinates(config.coords)
    known = CEILINGS[config.coords]
    found = coordinates.ceilings(latitude, longitude, Gazetteer.load(config.gazetteer), list(known))
    rows = {k: [found[k][f"within_{radius}"] for radius in RADII] for k in known}
    published = coordinates.PUBLISHED[config.coords]
    return {
        **{f"ceiling_{k}_{radius}": x for k, row in rows.items() for radius, x in zip(RADII, row, strict=True)},
        "deviation": max(abs(a - b) for k in known for a, b in zip(rows[k], known[k], strict=True)),
        "headroom": min(a - b for a, b in zip(rows[1][1:], published, strict=True)),
    }


def measure_cost(config: OracleOptions, seed: int) -> dict[str, Any]:
    """Captions that a photo is compared with; no chance is in it.

    Returns:
        flat: all cities that are asked for; hierarchical: all countries, and the most cities that one has; ratio.
    """
    from streetclip.gazetteer import Gazetteer

    places = Gazetteer.load(config.gazetteer)
    (cities,) = config.cities
    most = max(len(places.top(country, cities)) for country in range(len(places.countries)))
    flat, hierarchical = len(places.candidates(cities)), len(places.asked) + most
    return {"flat": float(flat), "hierarchical": float(hierarchical), "ratio": flat / hierarchical}


def arms_of(base: Config, **rates: float) -> dict[str, Config]:
    """CLIP, StreetCLIP, its ablations, and the head of fixed classes, in one budget.

    Args:
        base: StreetCLIP.
        rates: learning rate of an arm, where it is not the base's.
    """
    arms = {
        "clip": replace(base, method="clip"),
        "streetclip": base,
        "country-only": replace(base, template=COUNTRY_CAPTION),
        "drop-levels": replace(base, drop_levels=0.5),
        "image-tower": replace(base, towers="image"),
        "text-tower": replace(base, towers="text"),
        "label-head": replace(base, method="label-head"),
    }
    return {name: replace(arm, lr=rates.get(name.replace("-", "_"), arm.lr)) for name, arm in arms.items()}


def _only(arms: Mapping[str, Config], *names: str) -> dict[str, Config]:
    return {name: arms[name] for name in names}


# Rates: benchmarks/tuning.py.
_ARMS = arms_of(PRESETS["small"], country_only=3e-3, text_tower=3e-4)
_PAPER_ARMS = arms_of(PRESETS["paper"])


def arms_of_longer() -> dict[str, Config]:
    """CLIP and StreetCLIP from a CLIP that has learned for three times as long."""
    return {name: replace(_ARMS[name], generic_steps=2_400) for name in ("clip", "streetclip")}


_IM2GPS = {
    "clip": replace(PRESETS["im2gps3k"], model="openai/clip-vit-large-patch14-336"),
    "streetclip": PRESETS["im2gps3k"],
}
# with pilots, in which the first phase, of all arms alike, was settled
_TRIALS = {
    "clip": 9, "streetclip": 16, "country-only": 7, "drop-levels": 6, "image-tower": 3, "text-tower": 3,
    "label-head": 3,
}  # fmt: skip


def _gain(name: str, *arms: str, **more: Any) -> Claim:
    arms = arms or ("clip", "streetclip")
    return Claim(
        name=name, version=1, measure=measure,
        tuning={arm: _TRIALS.get(arm, 0) for arm in arms},
        **{
            "arms": {"small": _only(_ARMS, *arms), "paper": _only(_PAPER_ARMS, *arms)}, "treatment": "streetclip",
            "baseline": "clip", "seeds": 5, **more,
        },
    )  # fmt: skip


def _exact(name: str, options: OracleOptions, **more: Any) -> Claim:
    """A value without chance; the paper's setting is the same."""
    return Claim(
        name=name, version=1, seeds=5, treatment="geonames", baseline=None, compare="value", tuning={"geonames": 0},
        arms={"small": {"geonames": options}, "paper": {"geonames": options}}, **more,
    )  # fmt: skip


_COUNTRY = tuple(f"{group}_country_top1" for group in GROUPS)
_CHANCE = 100 / 24

CLAIMS: tuple[Claim, ...] = (
    _gain(
        "unseen-places", flagship=True, metric="unseen_country_top1", margin=3.0, chance=_CHANCE,
        also=("seen_country_top1", "unseen_within_200", "unseen_within_750", "seconds_of_training"),
        source="Section 4, Tables 1 and 2",
        statement="Synthetic captions lift zero-shot accuracy of the country by 3 points on places never trained on, "
        "cities and countries",
        paper="+1.3 to +3.4 points over CLIP within 25 to 2500 km (IM2GPS, IM2GPS3K)",
    ),
    _gain(
        "unseen-cities", seeds=10, metric="unseen_cities_country_top1", margin=3.0, chance=_CHANCE,
        also=("unseen_cities_within_200", "unseen_cities_within_750", "full_unseen_cities_within_200"),
        source="Section 4, Tables 1 and 2",
        statement="That holds on unseen cities of countries that were trained on",
        paper="+1.3 to +3.4 points over CLIP within 25 to 2500 km (IM2GPS, IM2GPS3K)",
    ),
    _gain(
        "unseen-countries", seeds=10, metric="unseen_countries_country_top1", margin=3.0, chance=_CHANCE,
        also=("unseen_countries_within_200", "unseen_countries_within_750", "full_unseen_countries_within_200"),
        source="Section 4, Tables 1 and 2",
        statement="That holds on unseen countries",
        paper="+1.3 to +3.4 points over CLIP within 25 to 2500 km (IM2GPS, IM2GPS3K)",
    ),
    _gain(
        "unseen-places-longer-start", seeds=10, metric="unseen_country_top1", margin=3.0, chance=_CHANCE,
        arms={"small": arms_of_longer(), "paper": _only(_PAPER_ARMS, "clip", "streetclip")},
        also=("seen_country_top1", "unseen_cities_country_top1", "unseen_countries_country_top1"),
        source="Section 4, Tables 1 and 2",
        statement="With a CLIP whose first phase was three times as long, the gain on unseen places is 3 points, too",
        paper="+1.3 to +3.4 points over CLIP within 25 to 2500 km (IM2GPS, IM2GPS3K)",
    ),
    _gain(
        "gain-25km", seeds=10, metric="unseen_within_25", margin=0.0,
        arms={"small": _only(_ARMS, "clip", "streetclip"), "paper": _IM2GPS},
        source="Table 2",
        statement="On places never trained on, StreetCLIP is above CLIP within 25 km",
        paper="22.4 against 19.5 % (IM2GPS3K)",
    ),
    _gain(
        "full-caption-cities", "clip", "streetclip", "country-only", baseline="country-only",
        metric="seen_city_given_country", margin=0.0, chance=100 / 16,
        also=(
            "unseen_cities_city_given_country", "full_seen_city_given_country", "full_unseen_cities_city_given_country"
        ),
        source="Section 3, synthetic captions",
        statement="With city, region and country in training captions, a country's cities are told better than with "
        "countries alone",
        paper="not stated; all three levels are in the caption",
    ),
    _gain(
        "full-caption-countries", "clip", "streetclip", "country-only", baseline="country-only",
        metric="seen_country_top1", margin=-2.0, chance=_CHANCE, also=_COUNTRY[1:],
        source="Section 3, synthetic captions",
        statement="That costs at most 2 points of accuracy on countries",
        paper="not stated; all three levels are in the caption",
    ),
    _gain(
        "label-head-unseen", "streetclip", "label-head", treatment="label-head", baseline=None, compare="value",
        better="less", metric="unseen_countries_country_top1", margin=_CHANCE, chance=_CHANCE,
        also=("seen_country_top1", "unseen_cities_country_top1"),
        source="Section 1, generalized zero-shot learning",
        statement="A softmax head of fixed classes is at chance or below on countries never trained on",
        paper="by construction",
    ),
    _gain(
        "streetclip-over-label-head", "streetclip", "label-head", baseline="label-head",
        metric="unseen_countries_within_750", margin=0.0, also=("seen_within_750", "unseen_cities_within_750"),
        source="Section 1, generalized zero-shot learning",
        statement="StreetCLIP is above that head within 750 km on countries never trained on",
        paper="zero-shot above supervised models (TransLocator 80.1 against 80.4 % within 2500 km, IM2GPS3K)",
    ),
    _gain(
        "both-towers", "clip", "streetclip", "image-tower", "text-tower", baseline="image-tower",
        metric="unseen_country_top1", margin=0.0, chance=_CHANCE, also=_COUNTRY,
        source="Section 3: both towers are trained",
        statement="Training both towers is above training the image tower alone, on unseen places",
        paper="not stated",
    ),
    _gain(
        "drop-levels", "clip", "streetclip", "drop-levels", seeds=10, treatment="drop-levels", baseline="streetclip",
        metric="unseen_country_top1", margin=0.0, chance=_CHANCE,
        also=(*_COUNTRY, "seen_city_given_country"),
        source="Ours: captions that lack their city or region at random",
        statement="Leaving city and region out of half the training captions lifts accuracy of the country on unseen "
        "places",
        paper="not stated; all three levels are in the caption",
    ),
    _gain(
        "hierarchical-accuracy", metric="hierarchical_gain_750", baseline=None, compare="value", margin=-1.0,
        also=("ms", "flat_ms"),
        source="Section 3, hierarchical linear probing",
        statement="Country, then city, is at most a point below all cities at once within 750 km",
        paper="not stated",
    ),
    _exact(
        "hierarchical-cost", OracleOptions(cities=(30,)), measure=measure_cost, metric="ratio", margin=10.0,
        also=("flat", "hierarchical"),
        source="Section 3, hierarchical linear probing",
        statement="With 30 cities of each country of GeoNames it compares a photo with a tenth of the captions",
        paper="some 200 countries, 30 cities each",
    ),
    _exact(
        "oracle-ceilings", OracleOptions(coords="im2gps3k"), measure=measure_ceilings, metric="deviation",
        better="less", margin=1.0, also=("ceiling_30_25", "ceiling_30_200", "ceiling_30_750", "ceiling_30_2500"),
        source="Ours: ceilings of 30 cities a country on IM2GPS3K",
        statement="Ceilings of the method for 1, 10, 30, 100 and all cities are those known, to a point",
        paper="not stated; 58.9, 84.6, 98.0, 98.8 % within 25, 200, 750, 2500 km for 30 cities",
    ),
    _exact(
        "oracle-ceilings-im2gps", OracleOptions(coords="im2gps"), measure=measure_ceilings, metric="deviation",
        better="less", margin=1.0, also=("ceiling_30_25", "ceiling_30_200", "ceiling_30_750", "ceiling_30_2500"),
        source="Ours: ceilings of 30 cities a country on IM2GPS",
        statement="The same for the 237 photos of IM2GPS, 1 and 30 cities",
        paper="not stated; 56.1, 83.5, 96.2, 99.6 % within 25, 200, 750, 2500 km for 30 cities",
    ),
    _exact(
        "published-below-biggest-city", OracleOptions(coords="im2gps3k"), measure=measure_ceilings, metric="headroom",
        margin=0.0, also=("ceiling_1_25", "ceiling_1_200", "ceiling_1_750", "ceiling_1_2500"),
        source="Table 2",
        statement="On IM2GPS3K, the most populous city of the right country is above StreetCLIP at every radius",
        paper="22.4, 37.4, 61.3, 80.4 % within 25, 200, 750, 2500 km",
    ),
)  # fmt: skip


def plot(folder: Path, scale: str) -> None:
    """Beside the effects: countries by arm and seed on seen and unseen places; cities; ceilings."""
    import json

    from metazoo.runfolder import config_to_dict

    from streetclip import plots

    by_name = {claim.name: claim for claim in CLAIMS if scale in claim.arms}
    arms: dict[str, dict[int, dict[str, Any]]] = {}
    ceilings: dict[str, Any] = {}
    for path in sorted((folder / "cells").glob("*.json")):
        cell = json.loads(path.read_text(encoding="utf-8"))
        claim = by_name.get(cell["claim"])
        if claim is None or cell["scale"] != scale or cell["version"] != claim.version or cell["seed"] >= claim.seeds:
            continue
        arm = claim.arms[scale].get(cell["arm"])
        if arm is None or config_to_dict(arm) != cell["config"]:
            continue
        if claim.name == "oracle-ceilings":
            ceilings = cell["metrics"]
        elif claim.measure is measure and arm in (_ARMS if scale == "small" else _PAPER_ARMS).values():
            arms.setdefault(cell["arm"], {})[cell["seed"]] = cell["metrics"]

    def values(metric: str, names: tuple[str, ...] | None = None) -> dict[str, list[float]]:
        """Of each arm that has it, by seed."""
        return {
            arm: [arms[arm][seed][metric] for seed in sorted(arms[arm])]
            for arm in (names or _ARMS)
            if arm in arms and all(metric in row for row in arms[arm].values())
        }

    panels = {
        title: found
        for title, metric in (
            ("cities trained on", _COUNTRY[0]),
            ("unseen cities", _COUNTRY[1]),
            ("unseen countries", _COUNTRY[2]),
        )
        if (found := values(metric))
    }
    if panels:
        plots.arms(
            panels, folder / f"{scale}-countries.png", label="country right [%]", chance=dict.fromkeys(panels, _CHANCE)
        )  # fmt: skip
    held = ("clip", "streetclip", "country-only")
    panels = {
        title: found
        for title, metric in (
            ("cities trained on,\n'from {city}'", "seen_city_given_country"),
            ("unseen cities,\n'from {city}'", "unseen_cities_city_given_country"),
            ("unseen cities,\ntraining template", "full_unseen_cities_city_given_country"),
        )
        if (found := values(metric, held))
    }
    if panels:
        plots.arms(
            panels, folder / f"{scale}-cities.png", label="city right, of the country's 16 [%]",
            chance=dict.fromkeys(panels, 100 / 16),
        )  # fmt: skip
    if ceilings:
        rows = {
            (f"best of {k} cities" if k else "best of all cities"): {
                f"within_{radius}": ceilings[f"ceiling_{k}_{radius}"] for radius in RADII
            }
            for k in CEILINGS["im2gps3k"]
        }
        from streetclip.coordinates import PUBLISHED

        published = {f"within_{r}": x for r, x in zip(RADII[1:], PUBLISHED["im2gps3k"], strict=True)}
        plots.ceilings(rows, folder / f"{scale}-ceilings.png", published)
