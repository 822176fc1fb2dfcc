"""What zero-shot geolocalisation is compared with: a softmax head of fixed classes, nearest neighbours, a constant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from metazoo.errors import UserError
from torch import Tensor, nn

from streetclip.data import Photos
from streetclip.gazetteer import Gazetteer, unit_vectors


class LabelHead(nn.Module):
    """Linear softmax head on the image tower: it can only name classes that it was trained on.

    Attributes:
        kind: country, city or cell (k-means of coordinates, as geocells).
        classes: names, (country, city) pairs, or cells' numbers.
        targets: [N] class of each training photo.
    """

    def __init__(
        self, kind: Literal["country", "city", "cell"], train: Photos, gazetteer: Gazetteer, width: int, cells: int,
        seed: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.kind = kind
        known = ~np.isnan(train.latitude) & ~np.isnan(train.longitude)
        if kind == "cell":
            if not known.all():
                raise UserError(f"--head cell: {train.names[int((~known).argmax())]} has no coordinates: give them")
            labels: Sequence[object] = _cells(train, cells, seed)
        elif kind == "city":
            if "" in train.city:
                raise UserError(f"--head city: {train.names[train.city.index('')]} has no city: give it")
            labels = list(zip(train.country, train.city, strict=True))
        else:
            labels = train.country
        self.classes = sorted(set(labels), key=str)
        if len(self.classes) < 2:
            raise UserError(f"--head {kind}: all training photos are of one class: give photos of more places")
        number = {label: i for i, label in enumerate(self.classes)}
        self.targets = torch.tensor([number[label] for label in labels])
        self.linear = nn.Linear(width, len(self.classes))
        self.register_buffer("place", torch.from_numpy(self._places(train, known, gazetteer)))

    place: Tensor
    """[classes, 2] latitude and longitude: the mean place of the class's training photos, else of the gazetteer."""

    def _places(self, train: Photos, known: np.ndarray, gazetteer: Gazetteer) -> np.ndarray:
        targets = self.targets.numpy()[known]
        sums = np.zeros((len(self.classes), 3))
        np.add.at(sums, targets, unit_vectors(train.latitude[known], train.longitude[known]))
        counts = np.bincount(targets, minlength=len(self.classes))
        return np.array([
            _direction(one) if count else _in_gazetteer(label, gazetteer)
            for one, count, label in zip(sums, counts, self.classes, strict=True)
        ])  # fmt: skip

    def forward(self, features: Tensor) -> Tensor:
        """Logits [B, classes] of features [B, d]; these have norm 1, so a fixed temperature of 20 goes with them."""
        return self.linear(20 * features)

    def country(self, found: np.ndarray, gazetteer: Gazetteer) -> np.ndarray:
        """Numbers in the gazetteer, -1 where it does not have them, of the countries of classes [N]."""
        if self.kind == "cell":
            places = self.place.cpu().numpy()
            return gazetteer.country[gazetteer.nearest(places[:, 0], places[:, 1])][found]
        names = [label[0] if isinstance(label, tuple) else label for label in self.classes]
        return np.array([gazetteer.country_number(str(name)) for name in names])[found]


def _cells(train: Photos, cells: int, seed: int) -> list[int]:
    from sklearn.cluster import KMeans

    places = unit_vectors(train.latitude, train.longitude)
    cells = min(cells, len(np.unique(places, axis=0)))
    found: list[int] = KMeans(cells, n_init=1, random_state=seed).fit_predict(places).tolist()
    return found


def _in_gazetteer(label: object, gazetteer: Gazetteer) -> tuple[float, float]:
    """Of a (country, city); or of a country, its most populous city."""
    if isinstance(label, tuple):
        number = gazetteer.find(*label)
    else:
        country = gazetteer.country_number(str(label))
        number = int(gazetteer.top(country, 1)[0]) if country >= 0 else None
    if number is None:
        raise UserError(f"{label}: no coordinates in the training photos, and not in the gazetteer: give either")
    return float(gazetteer.latitude[number]), float(gazetteer.longitude[number])


def mean_place(latitude: np.ndarray, longitude: np.ndarray) -> tuple[float, float]:
    """The place on the sphere nearest to all of [N]: the direction of their mean; (0, 0) if there is none."""
    return _direction(unit_vectors(latitude, longitude).mean(0))


def _direction(vector: np.ndarray) -> tuple[float, float]:
    """Degrees of a vector from the centre of the sphere."""
    x, y, z = vector
    if not np.hypot(np.hypot(x, y), z) > 1e-12:
        return 0.0, 0.0
    return float(np.degrees(np.arctan2(z, np.hypot(x, y)))), float(np.degrees(np.arctan2(y, x)))


def nearest_neighbours(
    features: np.ndarray, train: Photos, photos: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Latitudes and longitudes [N]: the mean place of the k training photos nearest by cosine.

    Args:
        features: [M, d] of norm 1, of the training photos, which have coordinates.
        photos: [N, d].
    """
    from sklearn.neighbors import NearestNeighbors

    k = min(k, len(features))
    found = NearestNeighbors(n_neighbors=k, metric="cosine").fit(features).kneighbors(photos, return_distance=False)
    places = [mean_place(train.latitude[one], train.longitude[one]) for one in found]
    latitude, longitude = np.array(places).T
    return latitude, longitude


def constant(train: Photos, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The mean place of all training photos that have coordinates, for every photo [count]."""
    known = ~np.isnan(train.latitude) & ~np.isnan(train.longitude)
    latitude, longitude = mean_place(train.latitude[known], train.longitude[known]) if known.any() else (0.0, 0.0)
    return np.full(count, latitude), np.full(count, longitude)
