"""Metrics that compare two sets of features, or look at one as a whole: their shared parts."""

from collections.abc import Sequence

import numpy as np

from infra.errors import DataError
from model.evaluate.distances import KernelSums, Moments, frechet_distance
from model.evaluate.metric import FOLDS, Features, Metric, Score, Video, jackknife, rounded

WIDE = 1024
"""Features of more numbers are held in fewer folds: their outer products are large."""
WIDE_FOLDS = 6


def rows_of(video: Video, name: str) -> np.ndarray:
    """A video's features as rows: one of a video, or one a frame."""
    return np.atleast_2d(video.features[name])


class FrechetMetric(Metric):
    """Fréchet distance between the features of the real and of the sampled videos; running moments alone."""

    better = "lower"
    needs_real = is_biased = True

    def __init__(self) -> None:
        self.folds: list[tuple[Moments, Moments]] = []
        """Of the real and of the sampled videos."""
        self.videos = np.zeros((2, FOLDS), int)

    def update(self, videos: Sequence[Video], prompts: Sequence[Features]) -> None:
        groups: dict[tuple[int, int], list[np.ndarray]] = {}
        for video in videos:
            rows = rows_of(video, self.needs[0])
            if not self.folds:
                number = FOLDS if rows.shape[1] <= WIDE else WIDE_FOLDS
                self.folds = [(Moments(rows.shape[1]), Moments(rows.shape[1])) for _ in range(number)]
            place = video.fold % len(self.folds), int(not video.is_real)
            groups.setdefault(place, []).append(rows)
        for (fold, side), found in groups.items():  # one product for many videos
            self.folds[fold][side].add(np.concatenate(found))
            self.videos[side, fold] += len(found)

    def compute(self) -> Score:
        refuse_empty(self.videos.sum(1).tolist())
        real, sampled = self._total(0), self._total(1)
        value = frechet_distance(real, sampled)

        def without(fold: int) -> float:
            one, two = self.folds[fold]
            return frechet_distance(real.without(one), sampled.without(two))

        interval = jackknife(value, without, self.videos.min(0))
        n_real, n = self.videos.sum(1).tolist()
        return Score(value, interval and (max(0.0, interval[0]), interval[1]), n, n_real)

    def _total(self, side: int) -> Moments:
        total = Moments(self.folds[0][side].dim)
        for fold in self.folds:
            total.merge(fold[side])
        return total


class KernelMetric(Metric):
    """Kernel distance between the features of the real and of the sampled videos; one row a video is kept."""

    better = "lower"
    needs_real = is_biased = True

    def __init__(self) -> None:
        self.rows: dict[bool, dict[str, tuple[int, np.ndarray]]] = {True: {}, False: {}}

    def update(self, videos: Sequence[Video], prompts: Sequence[Features]) -> None:
        for video in videos:
            rows = rows_of(video, self.needs[0])
            self.rows[video.is_real][video.name] = video.fold, rows[len(rows) // 2]

    def compute(self) -> Score:
        refuse_empty([len(self.rows[True]), len(self.rows[False])])
        real, sampled = (self._folds(side) for side in (True, False))
        sums = KernelSums(real, sampled)
        value = sums.distance()
        interval = jackknife(value, sums.distance, sums.sizes.min(0).tolist())
        return Score(value, interval, len(self.rows[False]), len(self.rows[True]))

    def _folds(self, is_real: bool) -> list[np.ndarray]:
        """Rows of each fold, in the order of their bytes: what the videos are called can't be seen."""
        each = sorted(self.rows[is_real].values(), key=lambda found: found[1].tobytes())
        return [
            np.array([row for at, row in each if at == fold], np.float64).reshape(-1, len(each[0][1]))
            for fold in range(FOLDS)
        ]


class InceptionScore(Metric):
    """exp E KL(p(y|x) ‖ p(y)) of a classifier (Salimans et al., 1606.03498), over the whole set at once."""

    better = "higher"
    is_biased = True

    def __init__(self) -> None:
        self.counts, self.entropies = np.zeros(FOLDS), np.zeros(FOLDS)
        self.classes: np.ndarray | None = None

    def update(self, videos: Sequence[Video], prompts: Sequence[Features]) -> None:
        for video in videos:
            if video.is_real:
                continue
            p = softmax(rows_of(video, self.needs[0]).mean(0))
            if self.classes is None:
                self.classes = np.zeros((FOLDS, len(p)))
            self.counts[video.fold] += 1
            self.classes[video.fold] += rounded(p)
            self.entropies[video.fold] += rounded(np.array(negative_entropy(p)))

    def compute(self) -> Score:
        refuse_empty([int(self.counts.sum())])
        value = self._score(np.ones(FOLDS, bool))
        interval = jackknife(
            value, lambda fold: self._score(np.arange(FOLDS) != fold), self.counts.astype(int).tolist()
        )
        return Score(value, interval, int(self.counts.sum()))

    def _score(self, keep: np.ndarray) -> float:
        assert self.classes is not None
        n = self.counts[keep].sum()
        marginal = self.classes[keep].sum(0) / n
        return float(np.exp(self.entropies[keep].sum() / n - negative_entropy(marginal)))


def refuse_empty(counts: Sequence[int]) -> None:
    """Raise DataError where a side has fewer than two videos."""
    if min(counts) < 2:
        raise DataError(f"{' and '.join(map(str, counts))} videos; two are the least")


def softmax(logits: np.ndarray) -> np.ndarray:
    x = np.exp(np.asarray(logits, np.float64) - logits.max())
    return x / x.sum()


def negative_entropy(p: np.ndarray) -> float:
    """Σ p ln p; 0 ln 0 = 0."""
    return float((p * np.log(np.where(p > 0, p, 1.0))).sum())
