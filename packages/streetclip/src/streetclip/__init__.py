"""StreetCLIP (Haas et al. 2023): zero-shot image geolocalisation by synthetic-caption pre-training of CLIP.

Training and evaluation are functions of their modules: ``streetclip.train.train``, ``streetclip.evaluate.evaluate``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from streetclip.baselines import LabelHead, nearest_neighbours
    from streetclip.captions import SyntheticCaptioner
    from streetclip.config import PRESETS, Config
    from streetclip.contrastive import backward, contrastive_loss
    from streetclip.coordinates import oracle_errors
    from streetclip.data import Data, Photos
    from streetclip.gazetteer import Gazetteer
    from streetclip.geolocator import GeoPrediction, HierarchicalZeroShotGeolocator, Place
    from streetclip.images import exif_coordinates, read_photo
    from streetclip.metrics import geo_accuracy_at_km, haversine_km
    from streetclip.model import Clip, load_model
    from streetclip.train import Run, SyntheticCaptionTrainer, train_on

__all__ = [
    "PRESETS",
    "Clip",
    "Config",
    "Data",
    "Gazetteer",
    "GeoPrediction",
    "HierarchicalZeroShotGeolocator",
    "LabelHead",
    "Photos",
    "Place",
    "Run",
    "SyntheticCaptionTrainer",
    "SyntheticCaptioner",
    "backward",
    "contrastive_loss",
    "exif_coordinates",
    "geo_accuracy_at_km",
    "haversine_km",
    "load_model",
    "nearest_neighbours",
    "oracle_errors",
    "read_photo",
    "train_on",
]

_HOME = {
    **dict.fromkeys(["LabelHead", "nearest_neighbours"], "baselines"),
    "oracle_errors": "coordinates",
    "SyntheticCaptioner": "captions",
    **dict.fromkeys(["PRESETS", "Config"], "config"),
    **dict.fromkeys(["backward", "contrastive_loss"], "contrastive"),
    **dict.fromkeys(["Data", "Photos"], "data"),
    "Gazetteer": "gazetteer",
    **dict.fromkeys(["GeoPrediction", "HierarchicalZeroShotGeolocator", "Place"], "geolocator"),
    **dict.fromkeys(["exif_coordinates", "read_photo"], "images"),
    **dict.fromkeys(["geo_accuracy_at_km", "haversine_km"], "metrics"),
    **dict.fromkeys(["Clip", "load_model"], "model"),
    **dict.fromkeys(["Run", "SyntheticCaptionTrainer", "train_on"], "train"),
}


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used: the command line starts without torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'streetclip' has no attribute {name!r}")
    return getattr(importlib.import_module(f"streetclip.{_HOME[name]}"), name)
