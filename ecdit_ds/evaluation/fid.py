"""The Frechet distance between two sets of pictures, by their features (FID; Heusel et al. 1706.08500).

|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), of the means and covariances of features; torchmetrics computes it in
float64. With other features than those of TensorFlow's Inception-v3 it is another number than papers print, and it
compares only with itself: same features model, same reference, same number of pictures.

Sums are all it needs, so sets are encoded in parts, on as many ranks as there are, and the real set only once.

Suffixes: B pictures, D features.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from ecdit_ds.errors import EvaluationError
from ecdit_ds.evaluation.features import FeatureModel
from ecdit_ds.files.durable import make_folders, replace_durably

_FORMAT = "ecdit_ds feature statistics 1"
_FEWEST = 2


@dataclass(frozen=True, kw_only=True)
class FeatureStatistics:
    """What the Frechet distance needs of a set of pictures; float64 on the CPU."""

    sum_D: Tensor
    outer_DD: Tensor
    """Sum of features times their transposes."""
    count: int
    features: str
    """Identity of the features model."""

    def __add__(self, other: "FeatureStatistics") -> "FeatureStatistics":
        """Return the statistics of both sets together; raise EvaluationError for features of two models."""
        _require_same_features(self, other)
        return FeatureStatistics(
            sum_D=self.sum_D + other.sum_D,
            outer_DD=self.outer_DD + other.outer_DD,
            count=self.count + other.count,
            features=self.features,
        )

    def over_ranks(self, total: Callable[[Tensor], Tensor]) -> "FeatureStatistics":
        """Return the statistics of all ranks' pictures, equal on all; collective.

        Args:
            total: sums a float64 tensor over the ranks (`World.sum`).
        """
        dim = len(self.sum_D)
        own = torch.cat([self.sum_D, self.outer_DD.flatten(), torch.tensor([self.count], dtype=torch.float64)])
        of_all = total(own).cpu()
        return FeatureStatistics(
            sum_D=of_all[:dim],
            outer_DD=of_all[dim:-1].view(dim, dim),
            count=round(float(of_all[-1])),
            features=self.features,
        )


def picture_statistics(pictures: Iterable[Image.Image], model: FeatureModel, *, batch_size: int) -> FeatureStatistics:
    """Return the statistics of pictures, encoded `batch_size` at a time; of no pictures, zeros."""
    batches = model.encode(pictures, batch_size=batch_size)
    return feature_statistics(batches, dim=model.dim, features=model.identity, device=model.device)


def feature_statistics(
    batches: Iterable[Tensor], *, dim: int, features: str, device: torch.device | None = None
) -> FeatureStatistics:
    """Return the statistics of features_BD given in batches, added up in float64 by torchmetrics.

    Args:
        dim: D, since there may be no batch.
        features: identity of what made the features.
        device: where the features are and the sums are made; the CPU by default.
    """
    metric = FrechetInceptionDistance(feature=_AsGiven(dim)).to(device or torch.device("cpu"))
    for features_BD in batches:
        metric.update(features_BD, real=True)  # in float64, whatever is given
    return FeatureStatistics(
        sum_D=metric.real_features_sum.cpu(),
        outer_DD=metric.real_features_cov_sum.cpu(),
        count=int(metric.real_features_num_samples),
        features=features,
    )


def frechet_distance(real: FeatureStatistics, generated: FeatureStatistics) -> float:
    """Return the Frechet distance between two sets, at least 0.

    Raises:
        EvaluationError: fewer than 2 pictures, features of two models, or features or a distance that is not finite.
    """
    _require_same_features(real, generated)
    for name, statistics in (("real", real), ("generated", generated)):
        if statistics.count < _FEWEST:
            raise EvaluationError(
                f"{name} pictures: {statistics.count} have no covariance; give at least {_FEWEST}, better thousands"
            )
        _require_finite(name, statistics)
    if not (real.outer_DD @ generated.outer_DD).isfinite().all():  # LAPACK may crash on the eigenvalues of such
        raise EvaluationError("Frechet distance: products of covariances overflow; the features model is damaged")
    dim = len(real.sum_D)
    metric = FrechetInceptionDistance(feature=_AsGiven(dim))
    for is_real in (True, False):
        metric.update(torch.zeros(0, dim, dtype=torch.float64), real=is_real)  # so that it answers in float64
    metric.real_features_sum, metric.fake_features_sum = real.sum_D, generated.sum_D
    metric.real_features_cov_sum, metric.fake_features_cov_sum = real.outer_DD, generated.outer_DD
    metric.real_features_num_samples, metric.fake_features_num_samples = (
        torch.tensor(real.count),
        torch.tensor(generated.count),
    )
    distance = float(metric.compute())
    if not math.isfinite(distance):  # and max(0.0, nan) is 0.0
        raise EvaluationError(f"Frechet distance: is {distance}; the features model overflows or is damaged")
    return max(0.0, distance)


def shortage(name: str, statistics: FeatureStatistics) -> str | None:
    """Return one line of warning where so few pictures leave the covariance without full rank, else None.

    Args:
        name: what the set is called in the warning, such as "generated pictures".
    """
    dim = len(statistics.sum_D)
    if statistics.count > dim:
        return None
    return (
        f"{name}: {statistics.count} are too few for {dim} features, so the covariance has no full rank and the "
        f"distance says little; give more than {dim}"
    )


def save_statistics(statistics: FeatureStatistics, path: Path) -> None:
    """Write statistics as safetensors, whole or not at all; raise OSError for no space or no permission.

    Raises:
        EvaluationError: features are not finite.
    """
    _require_finite("real", statistics)
    make_folders(path.parent)
    tensors = {
        "sum": statistics.sum_D.contiguous(),
        "outer": statistics.outer_DD.contiguous(),
        "count": torch.tensor(statistics.count),
    }
    replace_durably(path, save(tensors, {"format": _FORMAT, "features": statistics.features}))


def load_statistics(path: Path) -> FeatureStatistics:
    """Read what `save_statistics` wrote; raise EvaluationError for a file that is missing, damaged or another."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise EvaluationError(f"{path}: cannot be read as feature statistics ({error})") from error
    if metadata.get("format") != _FORMAT or tensors.keys() != {"sum", "outer", "count"}:
        raise EvaluationError(f"{path}: holds no feature statistics ({_FORMAT}); make them again from the pictures")
    dim = tensors["sum"].numel()
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes != {"sum": (dim,), "outer": (dim, dim), "count": ()}:
        raise EvaluationError(f"{path}: shapes {shapes} are not those of feature statistics; make them again")
    return FeatureStatistics(
        sum_D=tensors["sum"].double(),
        outer_DD=tensors["outer"].double(),
        count=int(tensors["count"]),
        features=metadata.get("features", ""),
    )


class _AsGiven(nn.Identity):
    """A features model for torchmetrics that gets the features themselves."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.num_features = dim


def _require_finite(name: str, statistics: FeatureStatistics) -> None:
    if not (statistics.sum_D.isfinite().all() and statistics.outer_DD.isfinite().all()):
        raise EvaluationError(f"{name} pictures: features are not finite; the features model overflows or is damaged")


def _require_same_features(one: FeatureStatistics, other: FeatureStatistics) -> None:
    if one.features != other.features or one.sum_D.shape != other.sum_D.shape:
        raise EvaluationError(
            f"feature statistics of two models: {one.features} with {len(one.sum_D)} features, and {other.features} "
            f"with {len(other.sum_D)}; make both with one features model"
        )
