"""What an encoder is worth, language by language: scored pairs, retrieval from a pool of all languages, its bias."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from metazoo import inner, runfolder
from metazoo.errors import UserError

from maml_align import metrics, search
from maml_align.config import BiasOptions, Config, EvaluateOptions, SearchOptions
from maml_align.data import Data, Pairs, Questions
from maml_align.model import DualEncoder, LinearEncoder, is_sentence_transformer
from maml_align.train import Run, encoder_of, load

Matrix = dict[tuple[str, str], float]


class Encodes(Protocol):
    """What is evaluated: unit vectors of texts."""

    def encode(self, texts: Sequence[str], batch_size: int = 64, role: str | None = None) -> np.ndarray: ...


def evaluate(run: Run | Path | str, options: EvaluateOptions | None = None) -> dict[str, Any]:
    """Score a run on its test part.

    Returns:
        Of scored pairs pearson and spearman, each ×100: mono_seen, cross_seen, mono_unseen, cross_unseen (means over
        pairs of languages; cross_unseen has an unseen language on one side or both), gap (mono_seen − cross_seen).
        Of questions map, mrr and recall (at k, ×100, the pool holding all languages), seen and unseen languages of
        the question apart, same_language (percent of the top k) and its chance; gap of the per-language pools.
        With ``zero_shot_`` before a name: before training; with ``tfidf_``: TF-IDF of character n-grams.
        All also goes to evaluation.json.

    Raises:
        UserError: not a run folder, an unfinished run, or no good checkpoint.
    """
    options = options or EvaluateOptions()
    if not isinstance(run, Run):
        run = load(run)
    config, source = run.config, run.data
    if source.kind == "vectors":
        in_world: dict[str, Any] = evaluate_world(run)
        _write(run, in_world)
        return in_world
    assert isinstance(run.encoder, DualEncoder)
    encoders: dict[str, Encodes] = {"": run.encoder}
    if options.zero_shot and config.method != "zero-shot":
        start = encoder_of(config, source)
        assert isinstance(start, DualEncoder)
        encoders["zero_shot_"] = start
    if options.baselines:
        from maml_align.baselines import TfidfEncoder

        encoders["tfidf_"] = TfidfEncoder(_texts(source, config))
    found: dict[str, Any] = {}
    matrices: dict[str, Matrix] = {}
    for prefix, encoder in encoders.items():
        summary, matrices[prefix] = score(encoder, source.test, config, options.k, options.batch_size)
        found |= {f"{prefix}{name}": value for name, value in summary.items()}
    _write(run, found)
    if options.plots:
        _plot(run, found, matrices[""])
    return found


def _write(run: Run, found: Mapping[str, Any]) -> None:
    runfolder.write_text(run.folder / "evaluation.json", json.dumps(found, indent=2, ensure_ascii=False) + "\n")


def _texts(source: Data, config: Config) -> list[str]:
    from maml_align import data

    return list(data.texts(source, (*config.languages, *config.unseen)))


def score(
    encoder: Encodes, part: Pairs | Questions, config: Config, k: int = 20, batch_size: int = 64
) -> tuple[dict[str, float], Matrix]:
    """Scores of a part in a config's languages, and by (language of the query, of the candidates)."""
    languages = (*config.languages, *config.unseen)
    if isinstance(part, Pairs):
        pearson, spearman = evaluate_sts(encoder, part, languages, batch_size)
        found = summarise(pearson, config.languages, config.unseen)
        found |= {
            f"spearman_{name}": value for name, value in summarise(spearman, config.languages, config.unseen).items()
        }
        return found, pearson
    return evaluate_retrieval(encoder, part, config, k, batch_size)


def evaluate_sts(
    encoder: Encodes, pairs: Pairs, languages: Sequence[str], batch_size: int = 64
) -> tuple[Matrix, Matrix]:
    """Pearson's and Spearman's correlation ×100 of cosine and score, for each pair of languages there is."""
    vectors: dict[tuple[Any, int], np.ndarray] = {}

    def encoded(one: str, other: str, which: int) -> np.ndarray:
        key = ((one, other)[which] if pairs.aligned else (one, other), which)
        if key not in vectors:
            vectors[key] = encoder.encode(pairs.pairs(one, other)[which], batch_size)
        return vectors[key]

    pearson, spearman = {}, {}
    for one in languages:
        for other in languages:
            if pairs.has(one, other):
                cosine = (encoded(one, other, 0) * encoded(one, other, 1)).sum(1)
                found = metrics.pearson_spearman(cosine, pairs.pairs(one, other)[2])
                pearson[one, other], spearman[one, other] = found["pearson"], found["spearman"]
    if not pearson:
        raise UserError(f"no scored pairs of {', '.join(languages)} in this part: give more data")
    return pearson, spearman


def summarise(matrix: Matrix, seen: Sequence[str], unseen: Sequence[str]) -> dict[str, float]:
    """Means over pairs of languages: mono_seen, cross_seen, mono_unseen, cross_unseen, where there are any; gap."""
    groups: dict[str, list[float]] = {}
    for (one, other), value in matrix.items():
        kind = "mono" if one == other else "cross"
        known = one in seen and other in seen
        if not known and one not in {*seen, *unseen}:
            continue
        groups.setdefault(f"{kind}_{'seen' if known else 'unseen'}", []).append(value)
    found = {name: float(np.mean(values)) for name, values in sorted(groups.items())}
    if "mono_seen" in found and "cross_seen" in found:
        found["gap"] = found["mono_seen"] - found["cross_seen"]
    return found


def evaluate_retrieval(
    encoder: Encodes, part: Questions, config: Config, k: int = 20, batch_size: int = 64
) -> tuple[dict[str, float], Matrix]:
    """Questions of each language against the sentences of all (LAReQA's X-Y), and of each language alone."""
    languages = (*config.languages, *config.unseen)
    candidates = {
        one: encoder.encode(part.candidates(one, config.context), batch_size, "document") for one in languages
    }
    of_candidate = np.repeat(np.arange(len(languages)), [len(candidates[one]) for one in languages])
    pool = np.concatenate([candidates[one] for one in languages])
    starts = np.searchsorted(of_candidate, np.arange(len(languages)))
    matrix: Matrix = {}
    rows: dict[str, dict[str, float]] = {}
    orders, asked_in = [], []
    for number, language in enumerate(languages):
        kept = np.array([
            text is not None and any(part.answers[one][i] >= 0 for one in languages)
            for i, text in enumerate(part.questions[language])
        ])  # fmt: skip
        asked = np.flatnonzero(kept)
        if not len(asked):
            continue
        texts = [part.questions[language][i] or "" for i in asked]
        similarity = encoder.encode(texts, batch_size, "query") @ pool.T
        relevant = np.zeros(similarity.shape, dtype=bool)
        for start, other in zip(starts, languages, strict=True):
            held = part.answers[other][asked] >= 0
            relevant[np.flatnonzero(held), start + part.answers[other][asked][held]] = True
        rows[language] = metrics.compute_retrieval(similarity, relevant, min(k, len(pool)))
        orders.append(metrics.top(similarity, k))
        asked_in.append(np.full(len(asked), number))
        for where, other in enumerate(languages):
            mine = of_candidate == where
            held = relevant[:, mine].any(1)
            if held.any():
                least = min(k, int(mine.sum()))
                found = metrics.compute_retrieval(similarity[held][:, mine], relevant[held][:, mine], least)
                matrix[language, other] = found["map"]
    if not rows:
        raise UserError("no question of the test part has an answer: give more data, or another --fold")
    groups = {"": list(rows), "seen_": config.languages, "unseen_": config.unseen}
    summary = {
        f"{prefix}{name}": float(np.mean([rows[one][name] for one in named if one in rows]))
        for prefix, named in groups.items()
        for name in ("map", "mrr", "recall")
        if any(one in rows for one in named)
    }
    order, language_of = np.concatenate(orders), np.concatenate(asked_in)
    summary["same_language"] = metrics.same_language_share(order, language_of, of_candidate)
    summary["same_language_chance"] = metrics.same_language_chance(language_of, of_candidate)
    summary |= {f"pool_{name}": value for name, value in summarise(matrix, config.languages, config.unseen).items()}
    return summary, matrix


def evaluate_world(run: Run) -> dict[str, float]:
    """Of test tasks of the synthetic world, adapted on a monolingual support set and tested on bilingual pairs.

    Returns:
        pearson and zero_shot_pearson ×100 (means over tasks, after adaptation and before); query_loss L_T and
        support_loss L_S (means over tasks); gap: mean over batches of tasks of |ΣL_T − ΣL_S| / n, ×1000.
    """
    import torch

    from maml_align import meta_distillation, rotations, tasks

    config, world, encoder = run.config, run.data.test, run.encoder
    assert isinstance(encoder, LinearEncoder)
    rng = np.random.default_rng([config.seed, 4])
    supports, queries = [], []
    for _ in range(rotations.TEST_TASKS):
        weights = world.weights(rng)
        one, other = rng.permutation(len(world.languages))[:2]
        for into, second, size in ((supports, one, config.shots), (queries, other, rotations.TEST_PAIRS)):
            first, last = np.full(size, one), np.full(size, second)
            vectors, scores = world.pairs(weights, first, last, rng)
            tokens = {
                "vectors": torch.from_numpy(vectors.reshape(2 * size, -1)),
                "language": torch.from_numpy(np.concatenate([first, last])),
            }
            into.append({"tokens": tokens, "scores": torch.from_numpy(scores), "weight": torch.ones(size)})
    support, query = tasks.stack(supports), tasks.stack(queries)
    loss = meta_distillation.similarity_loss(encoder)

    def adapted(params: inner.Params, support: Any, query: Any) -> Any:
        found = inner.adapt(
            loss, params, [support] * config.inner_steps, config.inner_lr, first_order=True, functional=True
        ).params  # fmt: skip
        cosines = []
        for weights in (found, params):
            one, two = encoder.embed(weights, query["tokens"]).chunk(2)
            cosines.append((one * two).sum(-1))
        return loss(found, query), loss(params, query), *cosines

    theta = {name: value.cpu() for name, value in inner.parameters(encoder).items()}
    found = inner.over_tasks(adapted, (None, 0, 0), theta, support, query)
    teacher, student, after, before = (value.detach().double().numpy() for value in found)
    scores = query["scores"].numpy()
    size = min(config.task_batch, len(teacher))
    difference = (teacher - student)[: len(teacher) // size * size]
    batches = np.abs(difference.reshape(-1, size).mean(1))
    pearson = [
        [metrics.pearson_spearman(one, truth)["pearson"] for one, truth in zip(cosines, scores, strict=True)]
        for cosines in (after, before)
    ]
    return {
        "pearson": float(np.mean(pearson[0])),
        "zero_shot_pearson": float(np.mean(pearson[1])),
        "query_loss": float(teacher.mean()),
        "support_loss": float(student.mean()),
        "gap": 1000 * float(batches.mean()),
    }


def language_bias(encoder: Encodes, part: Pairs | Questions, config: Config, k: int = 20) -> dict[str, float]:
    """How much an encoder favours the query's language: gap (one language minus two), and of questions the percent of
    the top k in it, with chance."""
    summary, _ = score(encoder, part, config, k)
    names = ("gap", "pool_gap", "same_language", "same_language_chance")
    return {name: summary[name] for name in names if name in summary}


def bias(options: BiasOptions) -> dict[str, Any]:
    """`maml-align bias`: :func:`language_bias` on the test part, before training and after.

    Raises:
        UserError: the run is one of the synthetic world, or as :func:`maml_align.train.load`.
    """
    run = load(options.run)
    if not isinstance(run.encoder, DualEncoder):
        raise UserError(f"{options.run} is of a synthetic world: there is no language bias to measure")
    start = encoder_of(run.config, run.data)
    assert isinstance(start, DualEncoder)
    before = language_bias(start, run.data.test, run.config, options.k)
    after = language_bias(run.encoder, run.data.test, run.config, options.k)
    return {f"zero_shot_{name}": value for name, value in before.items()} | after


def search_sentences(options: SearchOptions) -> str:
    """`maml-align search`: the sentences nearest to each query.

    Raises:
        UserError: no such run or model, an empty file, or fewer sentences than --k.
    """
    if is_sentence_transformer(options.run):
        encoder, sentences = DualEncoder.from_pretrained(options.run), None
    elif (options.run / "model").is_dir() and options.file is not None:
        encoder, sentences = DualEncoder.from_pretrained(options.run / "model"), None
    else:
        run = load(options.run)
        if not isinstance(run.encoder, DualEncoder):
            raise UserError(f"{options.run} is of a synthetic world: it has no sentences")
        encoder, sentences = run.encoder, _sentences(run)
    if options.file is not None:
        sentences = _lines(options.file)
    if sentences is None:
        raise UserError(f"{options.run} is a model without sentences: give --file")
    index = search.Index(encoder.encode(sentences, role="document"), options.index)
    scores, found = index.search(encoder.encode(options.queries, role="query"), options.k)
    out = []
    for query, values, places in zip(options.queries, scores, found, strict=True):
        out.append(query)
        out += [f"  {value:.3f}  {sentences[place]}" for value, place in zip(values, places, strict=True)]
    return "\n".join(out)


def _sentences(run: Run) -> list[str]:
    languages, part = (*run.config.languages, *run.config.unseen), run.data.test
    if isinstance(part, Questions):
        return [text for language in languages for text in part.sentences[language]]
    texts = [part.pairs(one, other)[1] for one in languages for other in languages if part.has(one, other)]
    return list(dict.fromkeys(text for some in texts for text in some))


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--file {path}: {getattr(error, 'strerror', None) or 'not UTF-8'}: give a text file"
        ) from error
    found = [line.strip() for line in text.splitlines() if line.strip()]
    if not found:
        raise UserError(f"--file {path}: no sentence in it: give one on each line")
    return found


def _plot(run: Run, found: Mapping[str, float], matrix: Matrix) -> None:
    from maml_align import plots

    config = run.config
    languages = (*config.languages, *config.unseen)
    values = np.array([[matrix.get((one, other), np.nan) for other in languages] for one in languages])
    pairs = isinstance(run.data.test, Pairs)
    plots.language_matrix(
        values, languages, languages, run.folder / "languages.png",
        title="Sentence 1 by sentence 2" if pairs else "Question by candidates of one language",
        label="Pearson ×100" if pairs else "mAP ×100", unseen=set(config.unseen),
    )  # fmt: skip
    prefix = "" if pairs else "pool_"
    names = [f"{prefix}{name}" for name in ("mono_seen", "cross_seen", "mono_unseen", "cross_unseen")]
    names += [] if pairs else ["map"]
    bars = {
        label: {
            name.removeprefix("pool_").replace("_", " "): found[f"{before}{name}"] for name in names if name in found
        }
        for label, before in (("trained", ""), ("before training", "zero_shot_"), ("TF-IDF", "tfidf_"))
        if any(f"{before}{name}" in found for name in names)
    }
    plots.comparison(bars, run.folder / "comparison.png", "Pearson ×100" if pairs else "mAP ×100")
