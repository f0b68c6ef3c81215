"""Text-to-image for Python users, in the conventions of `diffusers`.

pipe = TextToImagePipeline.from_pretrained("runs/demo")
image = pipe("a red seven to the left of a blue two", generator=torch.Generator().manual_seed(0)).images[0]
"""

import dataclasses
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from einops import rearrange
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ecdit_ds.errors import ConfigError, DataError
from ecdit_ds.flow.samplers import NoiseFn
from ecdit_ds.inference.images import to_uint8
from ecdit_ds.inference.load import DeviceMapConfig, EncoderFolders, load_generator, load_with_device_map
from ecdit_ds.inference.text_to_image import TextToImage, require_finite

OutputType = Literal["pil", "np", "pt", "latent"]
StepEnd = Callable[["TextToImagePipeline", int, float, dict[str, Tensor]], dict[str, Tensor] | None]
"""(pipeline, step from 0, time it ended at, {"latents": ...}) -> latents to go on with, under the same name, if any."""


class TextToImagePipeline:
    """A loaded model, ready for prompts."""

    def __init__(self, drawer: TextToImage) -> None:
        self.drawer = drawer
        self._progress_bar_config: dict[str, Any] = {}

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_path: str | Path,
        *,
        weights: str | None = None,
        torch_dtype: torch.dtype = torch.float32,
        device: str | torch.device | None = None,
        device_map: str | Mapping[str, Any] | None = None,
        max_memory: Mapping[int | str, int | str] | None = None,
        offload_folder: str | Path | None = None,
        vae: str | Path | None = None,
        text: str | Path | Sequence[str | Path] = (),
    ) -> "TextToImagePipeline":
        """Load a run's newest checkpoint, one checkpoint, or safetensors exported by tools/convert_ckpt.py.

        Args:
            pretrained_model_path: a local folder.
            weights: `ema` or `weight`; by default the average, or what an export holds.
            torch_dtype: such as torch.bfloat16.
            device: where the whole model goes; the first GPU by default, else the CPU.
            device_map: `auto`, or module name -> device: for a model larger than one device, by accelerate.
            max_memory: with device_map, device -> most memory, such as {0: "70GiB", "cpu": "100GiB"}.
            offload_folder: with device_map, where layers wait that fit nowhere else.
            vae: where the image autoencoder is, if not where it was when the model was trained.
            text: the same of the text encoders, all of them.

        Raises:
            CheckpointError: no model there, or damaged.
            DataError: a frozen encoder is not there, or another one than it was trained through.
            ConfigError: settings that exclude one another.
        """
        path = Path(pretrained_model_path)
        texts = [text] if isinstance(text, str | Path) else text
        folders = EncoderFolders(vae=None if vae is None else str(vae), text=[str(name) for name in texts])
        if device_map is None:
            if max_memory is not None or offload_folder is not None:
                raise ConfigError("max_memory and offload_folder have no effect without device_map; add one")
            where = None if device is None else torch.device(device)
            return cls(load_generator(path, kind=weights, dtype=torch_dtype, device=where, folders=folders))
        if device is not None:
            raise ConfigError(f"device: {device} and device_map exclude one another; give one")
        spread = DeviceMapConfig(
            device_map=device_map,
            max_memory=max_memory,
            offload_folder=None if offload_folder is None else Path(offload_folder),
        )
        return cls(load_with_device_map(path, spread, kind=weights, dtype=torch_dtype, folders=folders))

    @property
    def device(self) -> torch.device:
        """Where latents live."""
        return self.drawer.device

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the weights."""
        return self.drawer.model.patches.linear.weight.dtype

    def to(self, device: str | torch.device) -> "TextToImagePipeline":
        """Move the model, and return this pipeline.

        Raises:
            ConfigError: the model is placed by a device map.
        """
        where = torch.device(device)
        if hasattr(self.drawer.model, "hf_device_map"):
            raise ConfigError(f"device: {where}: a device_map has placed the model; load it without one to move it")
        self.drawer = dataclasses.replace(self.drawer, model=self.drawer.model.to(where), device=where)
        return self

    def set_progress_bar_config(self, **config: Any) -> None:
        """Set what tqdm is called with, such as disable=True."""
        self._progress_bar_config = config

    def __call__(
        self,
        prompt: str | Sequence[str],
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepEnd | None = None,
        *,
        sampler: str | None = None,
        eta: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        capacity_factor: float | None = None,
    ) -> Any:
        """Draw; what is left out is as the recipe's section `sample` says.

        Args:
            height, width: image pixels, multiples of what a patch covers; other sizes than the recipe's shift times.
            negative_prompt: one for all or one a prompt: what guidance leads away from.
            generator: of the noise, one for all or one an image; torch's global one without.
            latents: noise to start from, (images, C, H, W), instead of the generator's.
            output_type: `pil`, `np` (B, H, W, 3) in [0, 1], `pt` (B, 3, H, W) in [0, 1], or `latent`.
            return_dict: False gives (images,) instead of ImagePipelineOutput.
            callback_on_step_end: may look at latents and replace them.
            sampler, eta, guidance_interval, capacity_factor: as in `SampleConfig`.

        Raises:
            DataError: a prompt that is too long, counts or sizes that do not fit.
            ConfigError: a setting that cannot work.
            NonFiniteError: latents or images are not finite; none is returned.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        _check_request(prompts, num_images_per_prompt, output_type)
        sample = self.drawer.settings(
            num_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            sampler=sampler,
            eta=eta,
            guidance_interval=guidance_interval,
            capacity_factor=capacity_factor,
        )
        negative = _negatives(negative_prompt, len(prompts))
        repeated = [text for text in prompts for _ in range(num_images_per_prompt)]
        shape = (len(repeated), *self.drawer.latent_shape(height, width))
        noise = self._noise(shape, generator, latents)
        with tqdm(total=sample.num_steps, **self._progress_bar_config) as bar:
            tell = _Teller(self, bar, callback_on_step_end)
            drawn = self.drawer.denoise(
                repeated,
                noise=noise,
                sample=sample,
                negative_prompts=negative and [text for text in negative for _ in range(num_images_per_prompt)],
                callback=tell,
            )
            drawn = tell.ended(sample.num_steps - 1, 0.0, drawn)
        require_finite("latents", drawn, repeated, "callback_on_step_end gave them")
        images = self._as(output_type, drawn, repeated)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _noise(
        self,
        shape: tuple[int, ...],
        generator: torch.Generator | Sequence[torch.Generator] | None,
        start: Tensor | None,
    ) -> NoiseFn:
        generators = list(generator) if isinstance(generator, Sequence) else generator
        if isinstance(generators, list) and len(generators) != shape[0]:
            raise DataError(f"generator: {len(generators)} generators for {shape[0]} images; give one, or one an image")
        if start is not None and tuple(start.shape) != shape:
            raise DataError(f"latents: shape {list(start.shape)}, but these images need {list(shape)}")
        first = [] if start is None else [start.float()]

        def draw() -> Tensor:
            return first.pop() if first else randn_tensor(shape, generators, self.device, torch.float32)

        return draw

    def _as(self, output_type: OutputType, latents: Tensor, prompts: Sequence[str]) -> Any:
        if output_type == "latent":
            return latents
        images = self.drawer.decode(latents, prompts)
        if output_type == "pil":
            return [Image.fromarray(pixels) for pixels in to_uint8(images)]
        unit = (images.float() + 1) / 2
        return unit if output_type == "pt" else rearrange(unit, "b c h w -> b h w c").cpu().numpy()


def _check_request(prompts: Sequence[str], num_images_per_prompt: int, output_type: str) -> None:
    if not prompts or num_images_per_prompt < 1:
        raise DataError(f"prompt: {len(prompts)} prompts x {num_images_per_prompt} images are none; give one")
    known = typing.get_args(OutputType)
    if output_type not in known:
        raise ConfigError(f"output_type: {output_type!r} is not known; choose from {', '.join(known)}")


def _negatives(negative_prompt: str | Sequence[str] | None, count: int) -> list[str] | None:
    if negative_prompt is None:
        return None
    if isinstance(negative_prompt, str):
        return [negative_prompt] * count
    if len(negative_prompt) != count:
        raise DataError(f"negative_prompt: {len(negative_prompt)} for {count} prompts; give one, or one a prompt")
    return list(negative_prompt)


class _Teller:
    """Turns what samplers tell at the start of an interval into what diffusers tells at the end of one."""

    def __init__(self, pipeline: TextToImagePipeline, bar: "tqdm[Any]", on_step_end: StepEnd | None) -> None:
        self._pipeline, self._bar, self._on_step_end = pipeline, bar, on_step_end

    def __call__(self, step: int, time: float, latents: Tensor, /) -> Tensor | None:
        return self.ended(step - 1, time, latents) if step else None

    def ended(self, step: int, time: float, latents: Tensor) -> Tensor:
        """Tell that interval `step` ended at `time`, and return the latents to go on with."""
        self._bar.update()
        if self._on_step_end is None:
            return latents
        told = self._on_step_end(self._pipeline, step, time, {"latents": latents}) or {}
        return told.get("latents", latents)
