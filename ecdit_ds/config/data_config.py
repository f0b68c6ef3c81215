"""The part of a recipe that says what is trained on."""

import math
from dataclasses import dataclass
from typing import Literal

from ecdit_ds.config.validation import require_in_range, require_not_negative, require_positive
from ecdit_ds.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The corpus and how it is read."""

    dataset: Literal["digit_scenes", "encoded"] = "digit_scenes"
    """Embedded scenes, encoded before the first step, or what `path` names."""
    path: str | tuple[str, ...] | None = None
    """Path of the training set, or of several that are mixed; a recipe may leave it to the command line."""
    weights: tuple[float, ...] = ()
    """Share of the training samples that each path gives, up to a common factor; by default as many as it holds."""
    heldout_path: str | None = None
    """Path of the held-out set."""
    encode: Literal["offline", "online"] = "offline"
    """`offline`: the paths hold what tools/encode_data.py wrote. `online`, for small trials: they are what it would
    read, and pictures and captions go through the frozen encoders beside training."""
    vae: str | None = None
    """Online: folder of the image encoder; without one, pixels are the latents."""
    text: tuple[str, ...] = ()
    """Online: folders of the text encoders; without one, words get fixed vectors."""
    shift_factor: tuple[float, ...] = ()
    """Without an image encoder, pixels in [-1, 1] minus this, times `scaling_factor`, are the latents: one number, or
    one a channel. By default the mean of the training sets, each as often as it is read."""
    scaling_factor: tuple[float, ...] = ()
    """Likewise; by default one over their standard deviation."""
    image_column: str | None = None
    """Online: of a table; by default the first of the usual names."""
    caption_column: str | None = None
    """Online: likewise."""
    verify: Literal["checksums", "sizes"] = "checksums"
    """What encoded sets are compared with before training; the ranks share the work. With `sizes` no shard is read."""
    max_bad: float = 0.01
    """Bad samples are replaced; a run ends at the report by which more than this share of those that it has read so
    far, in all its lives, were bad. Until 1,000 were read, the share is of 1,000: one of the first ten ends nothing."""
    seed: int = 0
    """Which scenes; not the training seed, so that runs of several seeds share one set."""
    num_train: int = 16384
    """Scenes in the training set."""
    num_heldout: int = 256
    """Scenes, of other digit images and other captions, for the held-out loss."""
    cache_dir: str = "runs/cache"
    """Where encoded sets are kept, memory-mapped, one folder per setting."""
    num_workers: int = 1
    """Loader processes a rank; 0 reads in the training process."""

    def __post_init__(self) -> None:
        require_in_range("data", self, at_most={"seed": 2**63 - 1, "num_workers": 2**10})
        self._check_effects()
        require_positive("data", "num_train", self.num_train)
        require_positive("data", "num_heldout", self.num_heldout)
        require_not_negative("data", "num_workers", self.num_workers)
        if not 0.0 <= self.max_bad < 1.0:
            raise ConfigError(f"data.max_bad: {self.max_bad} is outside [0, 1); 0.01 is one bad sample in a hundred")
        if len(set(self.paths)) < len(self.paths):
            raise ConfigError(f"data.path: {', '.join(self.paths)} names a set twice; give it a higher data.weights")
        if self.weights and len(self.weights) != len(self.paths):
            raise ConfigError(
                f"data.weights: {len(self.weights)} for {len(self.paths)} of data.path; give one for each"
            )
        for weight in self.weights:
            if not (math.isfinite(weight) and weight > 0):
                raise ConfigError(
                    f"data.weights: {weight} is no positive number; leave out the path that is not wanted"
                )

        self._check_factors()

    def _check_factors(self) -> None:
        shift, scale = self.shift_factor, self.scaling_factor
        if len(shift) != len(scale) or len(shift) not in (0, 1, 3):
            raise ConfigError(
                f"data.shift_factor: {len(shift)} numbers, and data.scaling_factor: {len(scale)}; give "
                "one of each, or three, or leave both out"
            )
        for name, values, is_usable in (
            ("shift_factor", shift, all(map(math.isfinite, shift))),
            ("scaling_factor", scale, all(math.isfinite(value) and value > 0 for value in scale)),
        ):
            if not is_usable:
                raise ConfigError(f"data.{name}: {list(values)} are not all finite, and positive for scaling_factor")

    @property
    def paths(self) -> tuple[str, ...]:
        """Every path of the training set."""
        return (self.path,) if isinstance(self.path, str) else self.path or ()

    @property
    def is_online(self) -> bool:
        """Whether raw pictures and captions go through the encoders beside training."""
        return self.dataset == "encoded" and self.encode == "online"

    def _check_effects(self) -> None:
        """Refuse what would have no effect."""
        if self.verify != "checksums" and (self.dataset != "encoded" or self.is_online):
            raise ConfigError(f"data.verify: {self.verify} has no effect but on encoded sets; leave it out")
        others = ("path", "weights", "heldout_path", "shift_factor", "scaling_factor")
        if self.dataset != "encoded":
            self._refuse((*others, *_ONLINE), "data.dataset", self.dataset, "encoded")
            if self.encode != "offline":
                raise ConfigError(
                    f"data.encode: {self.encode} has no effect with data.dataset: {self.dataset}; set "
                    "data.dataset=encoded"
                )
        elif self.encode != "online":
            self._refuse(_ONLINE, "data.encode", self.encode, "online")
        if self.vae and self.shift_factor:
            raise ConfigError(
                f"data.shift_factor: {list(self.shift_factor)} has no effect with data.vae: {self.vae}, "
                "which has its own; leave it out"
            )

    def _refuse(self, names: tuple[str, ...], key: str, value: str, wanted: str) -> None:
        for name in names:
            given = getattr(self, name)
            if given:
                raise ConfigError(f"data.{name}: {given} has no effect with {key}: {value}; set {key}={wanted}")


_ONLINE = ("vae", "text", "image_column", "caption_column")
