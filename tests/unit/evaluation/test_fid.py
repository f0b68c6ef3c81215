"""The Frechet distance against closed forms, torchmetrics and scipy; sums that do not mind how a set is cut."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import scipy.linalg
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from ecdit_ds.errors import EvaluationError
from ecdit_ds.evaluation.features import FeatureModel, load_feature_model
from ecdit_ds.evaluation.fid import (
    FeatureStatistics,
    feature_statistics,
    frechet_distance,
    load_statistics,
    picture_statistics,
    save_statistics,
    shortage,
)
from tests.helpers.tiny_judges import pictures, save_clip, save_vit

Refusal = Callable[[Callable[[], object]], str]
GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "fid_features.safetensors"
CPU = torch.device("cpu")


def draw_features() -> dict[str, Tensor]:
    """Return two small sets of correlated features; `save_file(draw_features(), GOLDEN)` made the golden file."""
    rng = np.random.default_rng(2410)
    mixing = rng.standard_normal((2, 8, 8)) / 3.0
    real, generated = rng.standard_normal((40, 8)), rng.standard_normal((32, 8))
    return {
        "real": torch.from_numpy(real @ mixing[0] + 0.5).float(),
        "generated": torch.from_numpy(generated @ mixing[1] - 0.25).float(),
    }


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    """Return the saved features, (40, 8) and (32, 8)."""
    return safetensors.torch.load_file(GOLDEN)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> FeatureModel:
    """Return a tiny vision transformer with 16 features."""
    return load_feature_model(str(save_vit(tmp_path_factory.mktemp("vit"))), device=CPU)


def statistics_of(features_BD: Tensor, *sizes: int, features: str = "golden") -> FeatureStatistics:
    """Return the statistics of features, given in batches of these sizes, or all at once."""
    batches = features_BD.split(list(sizes) or len(features_BD))
    return feature_statistics(batches, dim=features_BD.shape[1], features=features)


def by_scipy(real_BD: Tensor, generated_BD: Tensor) -> float:
    """Return the formula as the paper prints it, in float64."""
    one, two = real_BD.double().numpy(), generated_BD.double().numpy()
    cov_one, cov_two = np.cov(one, rowvar=False), np.cov(two, rowvar=False)
    root = scipy.linalg.sqrtm(cov_one @ cov_two).real
    return float(((one.mean(0) - two.mean(0)) ** 2).sum() + np.trace(cov_one + cov_two - 2 * root))


def test_the_golden_features_are_those_of_the_script(golden: dict[str, Tensor]) -> None:
    drawn = draw_features()
    assert golden.keys() == drawn.keys()
    for name, features_BD in drawn.items():
        torch.testing.assert_close(golden[name], features_BD)


def test_the_distance_of_saved_features_is_that_of_the_formula_and_of_torchmetrics(golden: dict[str, Tensor]) -> None:
    ours = frechet_distance(statistics_of(golden["real"]), statistics_of(golden["generated"]))
    assert ours == pytest.approx(by_scipy(golden["real"], golden["generated"]), rel=1e-9)

    identity = nn.Identity()
    identity.num_features = 8  # type: ignore[assignment]
    theirs = FrechetInceptionDistance(feature=identity)
    theirs.update(golden["real"], real=True)
    theirs.update(golden["generated"], real=False)
    assert ours == pytest.approx(float(theirs.compute()), rel=1e-6)  # theirs is rounded to fp32
    assert ours > 1.0


def test_gaussians_that_differ_along_axes_have_the_distance_of_their_moments() -> None:
    # Columns of a Hadamard matrix: mean 0, no covariance, and variance 8 / 7 where 8 samples are divided by 7.
    signs = torch.from_numpy(scipy.linalg.hadamard(8)[:, 1:4]).double() * (7 / 8) ** 0.5
    spread_one, spread_two = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 2.0, 0.5])
    mean = torch.tensor([3.0, 0.0, -4.0])
    distance = frechet_distance(statistics_of(signs * spread_one), statistics_of(signs * spread_two + mean))
    assert distance == pytest.approx(25.0 + 1.0 + 0.0 + 6.25, rel=1e-9)


def test_a_set_is_at_no_distance_from_itself(golden: dict[str, Tensor]) -> None:
    real = statistics_of(golden["real"])
    assert 0.0 <= frechet_distance(real, real) < 1e-9


@pytest.mark.parametrize("sizes", [(40,), (1, 39), (13, 13, 14), (0, 40)])
def test_batches_do_not_change_the_distance(golden: dict[str, Tensor], sizes: tuple[int, ...]) -> None:
    whole, generated = statistics_of(golden["real"]), statistics_of(golden["generated"])
    cut = statistics_of(golden["real"], *sizes)
    assert cut.count == 40
    assert frechet_distance(cut, generated) == pytest.approx(frechet_distance(whole, generated), rel=1e-12)


def test_ranks_add_up_to_the_whole_set_even_one_without_pictures(golden: dict[str, Tensor]) -> None:
    whole, generated = statistics_of(golden["real"]), statistics_of(golden["generated"])
    parts = [statistics_of(golden["real"][rows]) for rows in (slice(0, 7), slice(7, 40))]
    parts.append(feature_statistics([], dim=8, features="golden"))
    sent: list[Tensor] = []
    for part in parts:
        part.over_ranks(lambda own: sent.append(own) or own)  # type: ignore[func-returns-value]
    of_all = parts[0].over_ranks(lambda _own: torch.stack(sent).sum(dim=0))
    added = parts[0] + parts[1] + parts[2]
    for found in (of_all, added):
        assert (found.count, found.features) == (40, "golden")
        assert frechet_distance(found, generated) == pytest.approx(frechet_distance(whole, generated), rel=1e-12)


def test_pictures_have_the_same_statistics_in_any_batches_whatever_their_sizes_and_modes(model: FeatureModel) -> None:
    mixed = [*pictures(5), *pictures(3, "wide", width=90), pictures(1, "grey")[0].convert("L")]
    mixed.append(pictures(1, "clear")[0].convert("RGBA"))
    whole = picture_statistics(mixed, model, batch_size=10)
    assert (whole.count, whole.sum_D.shape, whole.sum_D.dtype) == (10, (16,), torch.float64)
    for batch_size in (1, 3, 64):
        cut = picture_statistics(iter(mixed), model, batch_size=batch_size)
        torch.testing.assert_close(cut.sum_D, whole.sum_D, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(cut.outer_DD, whole.outer_DD, rtol=1e-5, atol=1e-5)


def test_other_pictures_are_farther_away(model: FeatureModel) -> None:
    real, alike, other = (
        picture_statistics(shown, model, batch_size=32)
        for shown in (pictures(64), pictures(64, "alike"), [p.point(lambda v: v // 4) for p in pictures(64, "dark")])
    )
    assert frechet_distance(real, alike) < 0.5 * frechet_distance(real, other)


def test_features_are_the_poolers_where_its_weights_are_there_and_else_the_mean_of_tokens(tmp_path: Path) -> None:
    pooled = load_feature_model(str(save_vit(tmp_path / "with")), device=CPU)
    bare = load_feature_model(str(save_vit(tmp_path / "without", with_pooler=False)), device=CPU)
    again = load_feature_model(str(tmp_path / "without"), device=CPU)  # a random pooler would differ every time
    assert (pooled.output, bare.output) == ("pooler_output", "last_hidden_state")
    assert pooled.identity != bare.identity == again.identity
    (picture,) = pictures(1)
    inputs = pooled.processor(images=picture, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        states = bare.model(pixel_values=inputs).last_hidden_state
        pooler = pooled.model(pixel_values=inputs).pooler_output
    torch.testing.assert_close(next(bare.encode([picture], batch_size=1)), states.mean(dim=1))
    torch.testing.assert_close(next(pooled.encode([picture], batch_size=1)), pooler)


def test_features_of_a_clip_are_its_image_embeddings(tmp_path: Path) -> None:
    clip = load_feature_model(str(save_clip(tmp_path)), device=CPU)
    assert (clip.output, clip.dim) == ("image_embeds", 8)
    (picture,) = pictures(1)
    inputs = clip.processor(images=picture, return_tensors="pt")["pixel_values"]
    tokens = torch.tensor([[0, 5, 1]])
    with torch.no_grad():
        embeds = clip.model(pixel_values=inputs, input_ids=tokens).image_embeds  # of unit length
    found = next(clip.encode([picture], batch_size=4))
    torch.testing.assert_close(found / found.norm(), embeds)


def test_the_identity_follows_weights_and_preparation_and_not_the_folder(tmp_path: Path, model: FeatureModel) -> None:
    same = save_vit(tmp_path / "elsewhere")
    assert load_feature_model(str(same), device=CPU).identity == model.identity
    settings = same / "preprocessor_config.json"
    settings.write_text(settings.read_text(encoding="utf-8").replace('"do_normalize": true', '"do_normalize": false'))
    assert load_feature_model(str(same), device=CPU).identity != model.identity


def test_statistics_come_back_from_their_file(golden: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "new" / "real.safetensors"
    saved = statistics_of(golden["real"])
    save_statistics(saved, path)
    found = load_statistics(path)
    assert (found.count, found.features) == (40, "golden")
    assert torch.equal(found.sum_D, saved.sum_D)
    assert torch.equal(found.outer_DD, saved.outer_DD)


def test_a_file_that_holds_no_statistics_is_refused(tmp_path: Path, refusal_of: Refusal) -> None:
    damaged = tmp_path / "damaged.safetensors"
    save_statistics(statistics_of(torch.ones(3, 2)), damaged)
    damaged.write_bytes(damaged.read_bytes()[:-9])
    later, misshapen = tmp_path / "later.safetensors", tmp_path / "misshapen.safetensors"
    tensors = {"sum": torch.ones(2), "outer": torch.ones(2, 2), "count": torch.tensor(3)}
    save_file(tensors, later, {"format": "ecdit_ds feature statistics 2", "features": "golden"})
    save_file(tensors | {"outer": torch.ones(3, 3)}, misshapen, {"format": "ecdit_ds feature statistics 1"})
    for path in (tmp_path / "none.safetensors", damaged, GOLDEN, later, misshapen):
        assert str(path) in refusal_of(lambda path=path: load_statistics(path))  # type: ignore[misc]


def test_sets_that_have_no_distance_are_refused(golden: dict[str, Tensor], refusal_of: Refusal) -> None:
    real = statistics_of(golden["real"])
    one = statistics_of(golden["generated"][:1])
    assert "generated pictures: 1 " in refusal_of(lambda: frechet_distance(real, one))
    assert "real pictures: 1 " in refusal_of(lambda: frechet_distance(one, real))
    frechet_distance(real, statistics_of(golden["generated"][:2]))
    other = statistics_of(golden["generated"], features="other")
    for action in (lambda: frechet_distance(real, other), lambda: real + other):
        message = refusal_of(action)
        assert "golden" in message
        assert "other" in message
    narrow = statistics_of(golden["generated"][:, :-1])
    for action in (lambda: frechet_distance(real, narrow), lambda: real + narrow):
        assert "of two models" in refusal_of(action)
    overflown = statistics_of(golden["generated"] * float("inf"))
    squares_alone = replace(real, outer_DD=real.outer_DD * float("inf"))
    for one in (overflown, squares_alone):
        assert "features are not finite" in refusal_of(lambda one=one: frechet_distance(real, one))  # type: ignore[misc]
        assert "features are not finite" in refusal_of(lambda one=one: frechet_distance(one, real))  # type: ignore[misc]


def test_too_few_pictures_for_the_features_are_warned_of_in_one_line(golden: dict[str, Tensor]) -> None:
    few = shortage("real pictures", statistics_of(golden["real"][:8]))  # 8 pictures span 7 dimensions around their mean
    assert few is not None
    assert len(few.splitlines()) == 1
    assert "real pictures: 8 " in few
    assert shortage("real pictures", statistics_of(golden["real"][:9])) is None


def test_what_is_no_features_model_is_refused(tmp_path: Path, refusal_of: Refusal) -> None:
    blind, incomplete, pickled = (save_vit(tmp_path / name) for name in ("blind", "incomplete", "pickled"))
    (blind / "preprocessor_config.json").unlink()
    weights = safetensors.torch.load_file(incomplete / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    safetensors.torch.save_file(weights, incomplete / "model.safetensors", {"format": "pt"})
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    (tmp_path / "empty").mkdir()
    reasons = {
        "": "none given",
        str(tmp_path / "empty"): "no config.json",
        str(tmp_path / "absent"): "neither a model folder nor",
        "nobody/nothing": "neither a model folder nor",
        str(blind): "no image processor",
        str(
            incomplete
        ): "1 weights of ViTModel are not in its files, or of another shape, such as layers.1.mlp.fc2.weight",
        str(pickled): "safetensors",
    }
    for name, reason in reasons.items():
        message = refusal_of(lambda name=name: load_feature_model(name, device=CPU))  # type: ignore[misc]
        assert message.startswith("features model")
        assert name in message
        assert reason in message


def test_a_batch_holds_at_least_one_picture(model: FeatureModel) -> None:
    with pytest.raises(EvaluationError, match="batch size 0"):
        picture_statistics(pictures(2), model, batch_size=0)
