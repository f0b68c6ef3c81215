"""Frozen encoders of other makers: a `diffusers` AutoencoderKL for images, `transformers` models for captions.

An encoder is a folder, or the name of one on the Hugging Face hub where no such folder is here. Weights are read from
safetensors alone and no code from a folder is run. A weight that the files do not hold would be drawn at random, and
a set encoded with it would look plausible; so it is refused, and so is what the files hold and the model did not take
(`stored_weights`). The libraries take seconds to import, so functions do.

Suffixes: B batch, C channels, H, W pixels (of the image or of the latents), T text tokens, D width.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ecdit_ds.data.encoders.base import TextEmbeddings
from ecdit_ds.data.encoders.folders import commit_of, fingerprint, folder_of, read_encoder_config
from ecdit_ds.data.encoders.stored_weights import (
    DIFFUSERS,
    LOCAL,
    TRANSFORMERS,
    left_over,
    not_in_index,
    opening,
    refuse_larger,
    refuse_larger_of_transformers,
    refuse_left_over,
    refuse_quantized,
)
from ecdit_ds.data.encoders.text_towers import encoder_of, has_pooler, load_tokenizer, positions_of, text_class
from ecdit_ds.errors import DataError

DEFAULT_TOKENS = 128
"""Longest caption in tokens, where the tokenizer has no lower limit of its own: T5 would take any number."""
Precision = Literal["fp32", "bf16"]
"""What an encoder computes in; what it returns is fp32."""
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
_opening = partial(opening, error=DataError)
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class PretrainedImageEncoder:
    """An AutoencoderKL; an `ImageEncoder`. Latents are the mean of its distribution, so encoding draws nothing."""

    model: Any
    identity: str
    shift_C11: Tensor
    scale_C11: Tensor
    precision: Precision = "fp32"
    revision: str | None = None
    """The commit that it is of, where it came from the hub."""

    @property
    def downsampling(self) -> int:
        """Image pixels per latent pixel."""
        return int(2 ** (len(self.model.config.block_out_channels) - 1))

    def encode(self, images_B3HW: Tensor) -> Tensor:
        """Return latents_BCHW of images in [-1, 1], scaled to about unit variance, fp32."""
        with torch.no_grad():
            latents = self.model.encode(images_B3HW.to(self.model.device, self.model.dtype)).latent_dist.mode()
        scaled: Tensor = (latents.float() - self.shift_C11) * self.scale_C11
        return scaled

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Return images_B3HW, cut to [-1, 1]; what is not finite is NaN."""
        latents = latents_BCHW.to(self.model.device, torch.float32) / self.scale_C11 + self.shift_C11
        with torch.no_grad():
            images: Tensor = self.model.decode(latents.to(self.model.dtype)).sample.float()
        return images.clamp(-1.0, 1.0).where(images.isfinite(), torch.nan)


@dataclass(frozen=True, kw_only=True)
class _Tower:
    """One text model with its tokenizer."""

    model: Any
    tokenizer: Any
    limit: int
    """Tokens it takes."""
    width: int
    """Width of the returned vectors, measured: configurations give it in many ways or not at all."""
    has_pooler: bool
    identity: str
    needs_padding: bool = False
    """Whether it reads a batch without padding otherwise: for want of a mask, an AIMv2's tokens then see later ones."""
    revision: str | None = None
    lock: threading.Lock = field(default_factory=threading.Lock, compare=False, repr=False)
    """Guards the tokenizer, which changes while it reads; several threads may use the encoder."""

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        # The limit is ours to keep; a tokenizer would warn of captions beyond it.
        with self.lock:
            tokens = self.tokenizer(list(captions), truncation=False, verbose=False)
        return [len(ids) for ids in tokens["input_ids"]]

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Return embeds (B, limit, width), zero where the mask is False, the mask, and pooled (B, width)."""
        device = self.model.device
        with self.lock:
            read = self.tokenizer(
                list(captions),
                padding="max_length",
                truncation=True,
                max_length=self.limit,
                return_tensors="pt",
                return_attention_mask=True,
            )
        tokens = read.to(device)
        mask = tokens["attention_mask"].bool()
        mask[:, 0] |= ~mask.any(dim=1)  # a tokenizer without marks has no token for no text; cross-attention needs one
        if self.needs_padding and mask.all():
            embeds, mask, pooled = self.encode([*captions, ""])
            return embeds[:-1], mask[:-1], pooled[:-1]
        with torch.no_grad():
            output = self.model(input_ids=tokens["input_ids"], attention_mask=mask.long())
        embeds = output.last_hidden_state.float() * mask[:, :, None]
        if self.has_pooler:
            return embeds, mask, output.pooler_output.float()
        return embeds, mask, embeds.sum(dim=1) / mask.sum(dim=1, keepdim=True)


@dataclass(frozen=True, kw_only=True)
class PretrainedTextEncoder:
    """One or several text models side by side; a `TextEncoder`.

    Several are joined along the width, as Stable Diffusion 3 joins its two CLIPs: cross-attention then costs as with
    one. Each fills up to `max_tokens` places with zeros; one whose own limit is lower sees the beginning of a longer
    caption, which the one with the highest limit sees whole. The mask is True where any of them has a token.
    """

    towers: tuple[_Tower, ...]
    precision: Precision = "fp32"

    @property
    def identity(self) -> str:
        """Names of its models, their weights and limits, and what they compute in."""
        return "+".join(f"{tower.identity}x{tower.limit}" for tower in self.towers) + _suffix(self.precision)

    @property
    def revisions(self) -> list[str | None]:
        """The commits that its models are of; None of what did not come from the hub."""
        return [tower.revision for tower in self.towers]

    @property
    def embed_dim(self) -> int:
        """The widths of all models together."""
        return sum(tower.width for tower in self.towers)

    @property
    def max_tokens(self) -> int:
        """The highest limit of its models."""
        return max(tower.limit for tower in self.towers)

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        """Return how many tokens captions have for the models with the highest limit."""
        longest = [tower.count_tokens(captions) for tower in self.towers if tower.limit == self.max_tokens]
        return [max(counts) for counts in zip(*longest, strict=True)]

    def encode(self, captions: Sequence[str]) -> TextEmbeddings:
        """Encode captions; raise DataError for one that no model sees whole."""
        for caption, count in zip(captions, self.count_tokens(captions), strict=True):
            if count > self.max_tokens:
                raise DataError(
                    f"caption {caption!r}: {count} tokens are more than the text encoder's {self.max_tokens}; "
                    "shorten the caption or raise --text-tokens"
                )
        parts = [tower.encode(captions) for tower in self.towers]
        filled = [torch.nn.functional.pad(embeds, (0, 0, 0, self.max_tokens - embeds.shape[1])) for embeds, *_ in parts]
        masks = [torch.nn.functional.pad(mask, (0, self.max_tokens - mask.shape[1])) for _, mask, _ in parts]
        return TextEmbeddings(
            embeds_BTD=torch.cat(filled, dim=2).cpu(),
            mask_BT=torch.stack(masks).any(dim=0).cpu(),
            pooled_BD=torch.cat([pooled for *_, pooled in parts], dim=1).cpu(),
        )

    def null(self) -> TextEmbeddings:
        """Return the encoding of the empty caption, B = 1."""
        return self.encode([""])


def load_image_encoder(
    name: str,
    *,
    device: torch.device | None = None,
    precision: Precision = "fp32",
    may_fetch: bool = True,
    revision: str | None = None,
) -> PretrainedImageEncoder:
    """Load a frozen AutoencoderKL; its config gives scaling, shift and number of channels.

    Args:
        name: a folder, or a name on the hub.
        may_fetch: whether a name that is not here may be asked of the hub: where a user gave it, and no file.
        revision: the commit of the hub's to take if it can be had, and else what the name stands for now.

    Raises:
        DataError: it is not here, of another kind, damaged, or has weights that are pickled, quantised or left over.
    """
    folder = folder_of(name, "image encoder", may_fetch, revision)
    config = read_encoder_config(folder / "config.json")
    kind = config.get("_class_name")
    if kind != "AutoencoderKL":
        raise DataError(f"image encoder {folder}: is a {kind}, but only AutoencoderKL is known; name its folder")
    with _opening(f"image encoder {folder}: cannot be loaded as AutoencoderKL from safetensors"):
        refuse_quantized(f"image encoder {folder}", folder, DIFFUSERS, DataError)
        from diffusers import AutoencoderKL
        from diffusers.utils import logging

        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # what it would warn of is refused here, by name
        try:
            depth = max(config.get("layers_per_block", 1), len(config.get("block_out_channels", ())))
            build = partial(AutoencoderKL.from_config, config)
            refuse_larger(f"image encoder {folder}", folder, DIFFUSERS, DataError, depth=depth, build=build)
            model, found = AutoencoderKL.from_pretrained(
                str(folder),
                use_safetensors=True,
                local_files_only=True,
                torch_dtype=torch.float32,
                output_loading_info=True,
                low_cpu_mem_usage=False,
                ignore_mismatched_sizes=True,
            )
        finally:
            logging.set_verbosity(verbosity)
        unindexed = not_in_index(folder, DIFFUSERS)  # which diffusers does not see
    _refuse_missing(f"image encoder {folder}", [*found["missing_keys"], *(m[0] for m in found["mismatched_keys"])])
    refuse_left_over(f"image encoder {folder}", {*found["unexpected_keys"], *unindexed}, DataError)
    # Module's own `to`: the one of diffusers warns of modules to be kept in fp32, and then lists none.
    model = torch.nn.Module.to(model.eval().requires_grad_(False), device or torch.device("cpu"), _DTYPES[precision])

    def per_channel(values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=model.device).reshape(-1, 1, 1)

    with _opening(f"image encoder {folder}: its config.json makes no working AutoencoderKL; mend it"):
        config = model.config
        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        encoder = PretrainedImageEncoder(
            model=model,
            identity=f"AutoencoderKL-{fingerprint(folder)}{_suffix(precision)}",
            shift_C11=per_channel(mean if mean is not None else config.shift_factor or 0.0),
            scale_C11=config.scaling_factor / per_channel(std if std is not None else 1.0),
            precision=precision,
            revision=commit_of(folder),
        )
        _try_out(encoder)
    return encoder


def _try_out(encoder: PretrainedImageEncoder) -> None:
    """Encode and decode one grey picture; raise ValueError where a factor or a shape cannot be."""
    factors = {"shift": encoder.shift_C11, "scale": encoder.scale_C11, "1 / scale": 1.0 / encoder.scale_C11}
    for name, factor_C11 in factors.items():
        if not factor_C11.isfinite().all():
            raise ValueError(f"the {name} of its latents is {factor_C11.flatten().tolist()}")
    images = torch.zeros(1, 3, 4 * encoder.downsampling, 4 * encoder.downsampling)
    latents = encoder.encode(images)
    if latents.shape[2:] != (4, 4) or encoder.decode(latents).shape != images.shape:
        raise ValueError(f"pictures of {images.shape[2]} pixels have latents of {latents.shape[2]}")


def _suffix(precision: Precision) -> str:
    """Return what an identity says of a precision; vectors of different ones are not alike to the last bit."""
    return "" if precision == "fp32" else f"-{precision}"


def load_text_encoder(
    names: Sequence[str],
    *,
    max_tokens: int = DEFAULT_TOKENS,
    device: torch.device | None = None,
    precision: Precision = "fp32",
    may_fetch: bool = True,
    revisions: Sequence[str | None] = (),
) -> PretrainedTextEncoder:
    """Load frozen text models with their tokenizers, to be joined along the width.

    Args:
        names: folders or hub names of T5 or CLIP models, or of any text tower that `AutoModel` loads.
        max_tokens: longest caption, where the model and its tokenizer allow it.
        may_fetch: as `load_image_encoder`.
        revisions: likewise, one for each name, or none at all.

    Raises:
        DataError: one is not here, of another kind, damaged, or has weights that are pickled, quantised or left over.
    """
    assert names
    device = device or torch.device("cpu")
    return PretrainedTextEncoder(
        towers=tuple(
            _load_tower(name, max_tokens, device, precision, may_fetch, revision)
            for name, revision in zip(names, revisions or [None] * len(names), strict=True)
        ),
        precision=precision,
    )


def _load_tower(
    name: str, max_tokens: int, device: torch.device, precision: Precision, may_fetch: bool, revision: str | None
) -> _Tower:
    folder = folder_of(name, "text encoder", may_fetch, revision)
    who = f"text encoder {folder}"
    tokenizer = load_tokenizer(folder, who)
    with _opening(f"{who}: cannot be loaded as a text model from safetensors"):
        refuse_quantized(who, folder, TRANSFORMERS, DataError)
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(str(folder), **LOCAL)
        model_class = text_class(config)
        refuse_larger_of_transformers(who, folder, DataError, config=config, model_class=model_class)
        whole, found = model_class.from_pretrained(
            str(folder),
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **LOCAL,
        )
        unknown = left_over(whole, config, found["unexpected_keys"], folder)
    model = encoder_of(whole, who)
    own = {id(parameter) for parameter in model.parameters()}
    parameters = {name for name, parameter in whole.named_parameters() if id(parameter) in own}
    # Marian's positions are sines and cosines, which its files leave out.
    computed = {key.removeprefix(f"{whole.base_model_prefix}.") for key in whole._keys_to_ignore_on_load_missing or ()}
    absent = sorted({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])} & parameters - computed)
    _refuse_missing(who, [key for key in absent if "pooler" not in key])
    refuse_left_over(who, unknown, DataError)
    limits = [tokenizer.model_max_length, positions_of(model), max_tokens]
    tower = _Tower(
        model=model.eval().requires_grad_(False).to(device, _DTYPES[precision]),
        tokenizer=tokenizer,
        limit=int(min(limit for limit in limits if limit and limit > 0)),
        width=0,
        has_pooler=not absent and has_pooler(model),
        identity=f"{type(model).__name__}-{fingerprint(folder)}",
        revision=commit_of(folder),
    )
    kind = type(model).__name__
    with _opening(f"{who}: is a {kind}, which cannot read a caption; name a model of text, such as a T5 or a CLIP"):
        longest = "a " * tower.limit
        full, padded = tower.encode([longest])[0], tower.encode([longest, ""])[0][:1]
    differs = bool((full - padded).abs().max() > 0.1 * padded.abs().max())  # by far more than rounding
    return replace(tower, width=full.shape[2], needs_padding=differs)


def _refuse_missing(who: str, names: Sequence[str]) -> None:
    if names:
        raise DataError(
            f"{who}: {len(names)} weights are not in its files, or of another shape, such as {sorted(names)[0]}; they "
            "would be random"
        )
