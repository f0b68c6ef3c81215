"""How much of an encoded set is read when it is opened, as whoever opens it says."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ecdit_ds.config.data_config import DataConfig
from ecdit_ds.config.model_config import ModelConfig
from ecdit_ds.config.recipe import Recipe
from ecdit_ds.data.latents.index import VerifyOptions
from ecdit_ds.data.latents.mmap_shard import Shard
from ecdit_ds.data.splits import open_split
from tests.helpers.made_sets import write_set


def test_of_a_set_that_is_opened_the_shards_are_read_whole_that_should_be(
    tiny_recipe: Recipe, tiny_config: ModelConfig, refusal_of: Callable[[Callable[[], object]], str], tmp_path: Path
) -> None:
    folder = write_set(tmp_path / "a", [((3, 8, 8), 6), ((3, 8, 8), 2)])
    model = replace(tiny_config, text_embed_dim=6, max_text_tokens=4)
    recipe = replace(tiny_recipe, model=model, data=DataConfig(dataset="encoded", path=str(folder)))
    second = folder / "shard-00001.arrow"
    whole = second.read_bytes()
    second.write_bytes(whole.replace(b"a 7", b"a 8"))  # a caption says something else, and the size is the same

    def open_with(**check: Any) -> Callable[[], object]:
        return lambda: open_split(recipe, "train", None, check=VerifyOptions(**check))

    for check in ({"checksums": False}, {"shards": slice(0, 1)}, {"shards": slice(0, 0)}):
        open_with(**check)()
    for check in ({}, {"shards": slice(1, 2)}):
        assert f"{second}: has checksum" in refusal_of(open_with(**check))
    second.write_bytes(whole[:-8])
    assert f"{second}: has {len(whole) - 8} bytes" in refusal_of(open_with(checksums=False))


def test_a_shard_of_more_or_fewer_rows_or_bytes_than_its_index_says_is_refused(
    refusal_of: Callable[[Callable[[], object]], str], tmp_path: Path
) -> None:
    path = write_set(tmp_path / "a", [((3, 8, 8), 3)], tokens=4, width=6) / "shard-00000.arrow"
    row_bytes = {"latents": 3 * 8 * 8 * 4, "text_embeds": 4 * 6 * 4, "text_mask": 4, "text_pooled": 6 * 4}
    assert Shard(path=path, count=3, row_bytes=row_bytes).find(2)[1] == 2
    for count in (2, 4):
        told = refusal_of(lambda count=count: Shard(path=path, count=count, row_bytes=row_bytes).find(0))  # type: ignore[misc]
        assert f"{path}: is no shard of this set (3 rows, but its index says {count})" in told
    for name, size in row_bytes.items():
        for other in (size - 1, size + 1):
            shard = Shard(path=path, count=3, row_bytes=row_bytes | {name: other})
            assert f"rows of {name} do not all have {other} bytes" in refusal_of(lambda shard=shard: shard.find(0))  # type: ignore[misc]
