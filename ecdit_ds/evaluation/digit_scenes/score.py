"""How often pictures show what their captions say: GenEval's protocol (arXiv 2310.11513) on digit scenes.

A score is worth what it is compared with: the checker's own score on real pictures (`ceiling`), and that of pictures
which have nothing to do with the captions (`chance`). All are counts, so parts of a set can be scored by different
ranks and their counts added.

Suffixes: B pictures; H, W pixels; C colour channels; S the three scores; K kinds, as in KINDS.
"""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ecdit_ds.data.digit_scenes.scenes import KINDS, Kind, Scene, SceneSpec, draw_scene, is_held_out, possible_claims
from ecdit_ds.evaluation.digit_scenes.checker import SceneVerdict, check_scenes, judge_scene
from ecdit_ds.evaluation.digit_scenes.detector import find_objects


@dataclass(frozen=True, kw_only=True)
class KindScore:
    """How many pictures of one kind were checked, were correct, and showed nothing else."""

    count: int
    correct: int
    exact: int

    @property
    def share(self) -> float:
        """Correct pictures, of all; NaN of none."""
        return self.correct / self.count if self.count else math.nan

    @property
    def exact_share(self) -> float:
        """Correct pictures that show nothing else, of all; NaN of none."""
        return self.exact / self.count if self.count else math.nan

    @property
    def standard_error(self) -> float:
        """Standard error of the share, if pictures are independent; NaN without pictures."""
        return math.sqrt(self.share * (1 - self.share) / self.count) if self.count else math.nan


@dataclass(frozen=True, kw_only=True)
class SceneScores:
    """Scores by kind, and GenEval's overall score: the mean over the kinds that were checked, however many of each."""

    kinds: tuple[KindScore, ...]
    """In the order of KINDS."""

    @property
    def overall(self) -> float:
        """The mean share of correct pictures; NaN if nothing was checked."""
        return _mean([score.share for score in self.kinds if score.count])

    @property
    def exact(self) -> float:
        """The mean share of correct pictures that show nothing else; NaN if nothing was checked."""
        return _mean([score.exact_share for score in self.kinds if score.count])

    @property
    def standard_error(self) -> float:
        """Standard error of `overall`, over pictures of the same captions; NaN if nothing was checked."""
        errors = [score.standard_error for score in self.kinds if score.count]
        return math.hypot(*errors) / len(errors) if errors else math.nan

    def counts(self) -> npt.NDArray[np.int64]:
        """Return (K, 3) numbers checked, correct and exact; those of parts may be added."""
        return np.array([[score.count, score.correct, score.exact] for score in self.kinds])

    def summary(self) -> dict[str, Any]:
        """Return what a log wants to keep, as plain data; kinds that were not checked are left out."""
        by_kind = {
            kind: {**asdict(score), "share": score.share, "standard_error": score.standard_error}
            for kind, score in zip(KINDS, self.kinds, strict=True)
            if score.count
        }
        return {"overall": self.overall, "standard_error": self.standard_error, "exact": self.exact, "kinds": by_kind}


@dataclass(frozen=True, kw_only=True)
class SceneAlignment:
    """A model's score between the two that it can be compared with."""

    model: SceneScores
    ceiling: SceneScores
    """The real pictures of the same captions: what the checker grants to perfection."""
    chance: SceneScores
    """The model's pictures, each against what another picture should show."""

    def counts(self) -> npt.NDArray[np.int64]:
        """Return (3, K, 3) numbers, of model, ceiling and chance; those of parts may be added."""
        return np.stack([scores.counts() for scores in (self.model, self.ceiling, self.chance)])

    def summary(self) -> dict[str, Any]:
        """Return what a log wants to keep, as plain data."""
        return {name: getattr(self, name).summary() for name in ("model", "ceiling", "chance")}


def scores_of(counts_K3: npt.NDArray[np.integer[Any]]) -> SceneScores:
    """Return scores of summed `SceneScores.counts`."""
    return SceneScores(
        kinds=tuple(
            KindScore(count=count, correct=correct, exact=exact) for count, correct, exact in counts_K3.tolist()
        )
    )


def alignment_of(counts_SK3: npt.NDArray[np.integer[Any]]) -> SceneAlignment:
    """Return the alignment of summed `SceneAlignment.counts`."""
    model, ceiling, chance = (scores_of(counts_K3) for counts_K3 in counts_SK3)
    return SceneAlignment(model=model, ceiling=ceiling, chance=chance)


def heldout_prompts(*, seed: int, canvas_height: int, canvas_width: int, per_kind: int) -> list[Scene]:
    """Return the first `per_kind` held-out scenes of each kind, kind after kind, the captions of a kind distinct.

    Kinds that have not so many held-out captions ("a two" and "a one" are all that is held out of the single ones) say
    the same again, no caption more than twice its share.

    Args:
        seed: of the corpus.
        canvas_height: pixels, 16 or more.
        canvas_width: pixels, 16 or more.
        per_kind: how many scenes.

    Raises:
        DataError: the canvas is too small.
    """
    chosen: dict[Kind, list[Scene]] = {kind: [] for kind in KINDS}
    # Twice: the last few captions of a kind would be long in coming.
    limits = {kind: -(-2 * per_kind // sum(map(is_held_out, possible_claims(kind)))) for kind in KINDS}
    times_said: Counter[str] = Counter()
    for index in itertools.count():
        if all(len(scenes) == per_kind for scenes in chosen.values()):
            return [scene for scenes in chosen.values() for scene in scenes]
        scene = draw_scene(
            seed=seed, split="heldout", index=index, canvas_height=canvas_height, canvas_width=canvas_width
        )
        if len(chosen[scene.kind]) < per_kind and times_said[scene.caption] < limits[scene.kind]:
            times_said[scene.caption] += 1
            chosen[scene.kind].append(scene)
    raise AssertionError("itertools.count ended")


def score_alignment(
    images_BHWC: npt.NDArray[np.uint8], scenes: Sequence[Scene], others: Sequence[SceneSpec]
) -> SceneAlignment:
    """Score pictures drawn from the captions of scenes, with ceiling and chance.

    Args:
        images_BHWC: pictures, one a scene.
        scenes: whose captions were drawn.
        others: `mismatched_specs` of the whole set, the entries that belong to these scenes.

    Raises:
        DataError: the pictures are not uint8 RGB of 16 x 16 pixels or more.
    """
    claims, found = [scene.claim for scene in scenes], find_objects(images_BHWC)
    return SceneAlignment(
        model=count_verdicts(
            claims, [judge_scene(claim, objects) for claim, objects in zip(claims, found, strict=True)]
        ),
        ceiling=score_scenes(np.stack([scene.image_HWC for scene in scenes]), claims),
        chance=count_verdicts(
            others, [judge_scene(claim, objects) for claim, objects in zip(others, found, strict=True)]
        ),
    )


def mismatched_specs(claims: Sequence[SceneSpec]) -> list[SceneSpec]:
    """Return for each claim another of its kind: the next in the sequence, cyclically, that does not mean the same.

    Where all of a kind mean the same it is one that the sequence does not have.
    """
    own = {kind: [claim for claim in claims if claim.kind == kind] for kind in KINDS}
    num_passed: Counter[Kind] = Counter()
    others = []
    for claim in claims:
        place = num_passed[claim.kind]
        num_passed[claim.kind] += 1
        following = (own[claim.kind][place + 1 :], own[claim.kind][:place], possible_claims(claim.kind))
        others.append(next(other for other in itertools.chain(*following) if other.meaning != claim.meaning))
    return others


def score_scenes(images_BHWC: npt.NDArray[np.uint8], claims: Sequence[SceneSpec]) -> SceneScores:
    """Return how often pictures show what the claims say, one claim a picture.

    Raises:
        DataError: the pictures are not uint8 RGB of 16 x 16 pixels or more.
    """
    return count_verdicts(claims, check_scenes(images_BHWC, claims))


def count_verdicts(claims: Sequence[SceneSpec], verdicts: Sequence[SceneVerdict]) -> SceneScores:
    """Return the scores of verdicts on claims."""
    counts_K3 = np.zeros((len(KINDS), 3), dtype=np.int64)
    for claim, verdict in zip(claims, verdicts, strict=True):
        counts_K3[KINDS.index(claim.kind)] += (1, verdict.is_correct, verdict.is_exact)
    return scores_of(counts_K3)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
