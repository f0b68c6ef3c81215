"""Encoded sets of made-up numbers, in which a sample can be told from any other."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch

from ecdit_ds.data.encoders.base import TextEmbeddings
from ecdit_ds.data.latents.columns import DTYPES, to_table
from ecdit_ds.data.latents.index import SCHEMA_VERSION, LatentIndex, ShardInfo
from ecdit_ds.data.latents.shard_writer import write_arrow_shard, write_index, write_null_text

Shape = tuple[int, int, int]


def write_set(
    folder: Path,
    runs: Sequence[tuple[Shape, int]],
    *,
    dtype: str = "float32",
    tokens: int = 4,
    width: int = 6,
    pooled: int | None = None,
    image: str = "made pictures",
    text: str = "made words",
    has_text: bool = True,
    broken: Mapping[int, str] = MappingProxyType({}),
) -> Path:
    """Write a set and return its folder; all numbers of sample i are i, and its caption is `<folder> <i>`.

    Args:
        folder: does not exist yet.
        runs: shape of latents and number of samples of each shard.
        dtype: of what is stored.
        tokens, width: of a text.
        pooled: width of pooled texts; `width` by default.
        image, text: identities of the encoders.
        has_text: whether text vectors are stored.
        broken: samples that cannot be trained on: `mask` for a text without a token, or the tensor of which the last
            number is what follows, such as `latents nan`.
    """
    folder.mkdir(parents=True)
    buckets = tuple(dict.fromkeys(shape for shape, _ in runs))
    shards, first = [], 0
    for number, (shape, count) in enumerate(runs):
        values = torch.arange(first, first + count, dtype=torch.float32)
        latents_BCHW = values.view(-1, 1, 1, 1).repeat(1, *shape)
        made = TextEmbeddings(
            embeds_BTD=values.view(-1, 1, 1).repeat(1, tokens, width),
            mask_BT=torch.ones(count, tokens, dtype=torch.bool),
            pooled_BD=values.view(-1, 1).repeat(1, pooled or width),
        )
        tensors = {"latents": latents_BCHW, "text_embeds": made.embeds_BTD, "text_pooled": made.pooled_BD}
        for sample in broken.keys() & set(range(first, first + count)):
            tensor, _, broken_number = broken[sample].partition(" ")
            if tensor == "mask":
                made.mask_BT[sample - first] = False
            else:
                tensors[tensor][sample - first].view(-1)[-1] = float(broken_number)
        table = to_table(
            keys=[str(i) for i in range(count)],
            captions=[f"{folder.name} {first + i}" for i in range(count)],
            kinds=["made"] * count,
            latents_BCHW=latents_BCHW,
            text=made if has_text else None,
            dtype=DTYPES[dtype],
        )
        name = f"shard-{number:05}.arrow"
        rows, size, checksum = write_arrow_shard(folder / name, [table], has_text=has_text)
        shards.append(ShardInfo(file=name, bucket=buckets.index(shape), count=rows, bytes=size, xxh3=checksum))
        first += count
    null_text = {
        "text_embeds": torch.zeros(1, tokens, width),
        "text_mask": torch.ones(1, tokens, dtype=torch.bool),
        "text_pooled": torch.zeros(1, pooled or width),
    }
    index = LatentIndex(
        schema=SCHEMA_VERSION,
        count=first,
        image_encoder={"identity": image},
        text_encoder={"identity": text},
        latents_dtype=dtype,
        text_shape=(tokens, width),
        pooled_width=pooled or width,
        has_text=has_text,
        buckets=buckets,
        shards=tuple(shards),
        latents_mean=(0.0,) * buckets[0][0],
        latents_std=(1.0,) * buckets[0][0],
        settings={},
        **write_null_text(folder, null_text),
    )
    write_index(folder, index)
    return folder
