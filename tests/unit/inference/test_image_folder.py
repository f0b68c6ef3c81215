"""A folder of pictures: the same one whoever is killed on the way, and never a mixture."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ecdit_ds.config.model_config import ModelConfig
from ecdit_ds.config.recipe import Recipe
from ecdit_ds.errors import DataError, TopologyError
from ecdit_ds.inference import image_folder as gallery
from ecdit_ds.inference.image_folder import (
    OF_SCENES,
    GeneratedImage,
    GenerationSettings,
    ImageRequest,
    generate_to_folder,
    image_folder_digest,
    is_of_other_pictures,
    read_gallery,
    read_picture,
    remove_images,
    shares_routing_pool,
)
from ecdit_ds.inference.load import load_generator
from ecdit_ds.inference.ranks import DistributedContext, init_ranks

MakeRecipe = Callable[..., Recipe]
SaveModel = Callable[..., Path]
RefusalOf = Callable[[Callable[[], object]], str]

FACTS: dict[str, Any] = {"checkpoint": "/runs/demo/step_9", "step": 9}
JOBS = [ImageRequest(prompt=f"{word} nine", seed=seed) for seed, word in enumerate(("a", "two", "red", "blue", "one"))]


@pytest.fixture
def crew(monkeypatch: pytest.MonkeyPatch) -> DistributedContext:
    """Return this process alone; joining tells the environment, which the test gives back."""
    for name in ("RANK", "LOCAL_RANK", "LOCAL_SIZE", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    return init_ranks()


@pytest.fixture
def make_brush(tmp_path: Path, make_recipe: MakeRecipe, save_model: SaveModel) -> Callable[..., GenerationSettings]:
    """Return `make_brush("model.x=y", ...)`: how a random model draws, in one step and two at a time."""

    def make(*overrides: str) -> GenerationSettings:
        drawer = load_generator(save_model(tmp_path / f"model{len(overrides)}", make_recipe(*overrides)))
        return GenerationSettings(drawer=drawer, sample=drawer.settings(num_steps=1, guidance_scale=1.0), batch_size=2)

    return make


@pytest.fixture
def brush(make_brush: Callable[..., GenerationSettings]) -> GenerationSettings:
    """Return the tiny recipe's."""
    return make_brush()


Draw = Callable[..., list[GeneratedImage]]


@pytest.fixture
def draw(brush: GenerationSettings, crew: DistributedContext) -> Draw:
    """Return `draw(folder, jobs, facts, overwrite=..., batch_size=...)`."""

    def fill_folder(
        folder: Path,
        jobs: list[ImageRequest] = JOBS,
        facts: dict[str, Any] = FACTS,
        *,
        overwrite: bool = False,
        **changes: Any,
    ) -> list[GeneratedImage]:
        return generate_to_folder(folder, jobs, replace(brush, **changes), facts, crew, overwrite=overwrite)

    return fill_folder


def content(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def pixels(folder: Path) -> np.ndarray:
    """Return the pictures of a folder in their order."""
    return np.stack([np.asarray(read_picture(folder, picture)) for picture in read_gallery(folder)]).astype(int)


@pytest.fixture
def whole(tmp_path: Path, draw: Draw) -> Path:
    """Return the folder as it is when nothing happens."""
    draw(tmp_path / "whole")
    return tmp_path / "whole"


def test_a_folder_tells_its_pictures_in_order_and_how_they_were_drawn(whole: Path) -> None:
    lines = [json.loads(line) for line in (whole / "pictures.jsonl").read_text(encoding="utf-8").splitlines()]
    names = ["000000_a_nine", "000001_two_nine", "000002_red_nine", "000003_blue_nine", "000004_one_nine"]
    assert lines == [{"index": i, "file": f"pictures/{name}.png", **asdict(JOBS[i])} for i, name in enumerate(names)]
    told = json.loads((whole / "settings.json").read_text(encoding="utf-8"))
    assert told == FACTS | {
        "sampler": "euler",
        "num_steps": 1,
        "eta": 1.0,
        "guidance_scale": 1.0,
        "guidance_interval": [0.0, 1.0],
        "capacity_factor": None,
        "negative_prompt": None,
        "height": None,
        "width": None,
    }
    assert set(content(whole)) == {"settings.json", "pictures.jsonl", *(f"pictures/{name}.png" for name in names)}


def test_a_picture_is_that_of_its_prompt_and_seed(whole: Path, brush: GenerationSettings) -> None:
    assert np.array_equal(pixels(whole)[2:4], brush.draw(JOBS[2:4]))


@pytest.mark.parametrize("drawn", range(5))
def test_a_folder_interrupted_after_any_picture_ends_bit_for_bit_as_the_uninterrupted(
    tmp_path: Path, whole: Path, draw: Draw, monkeypatch: pytest.MonkeyPatch, drawn: int
) -> None:
    saved, save_png = list[Path](), gallery.save_png

    def save_and_die(image: np.ndarray, path: Path) -> None:
        if len(saved) == drawn:
            raise KeyboardInterrupt
        saved.append(path)
        save_png(image, path)

    with monkeypatch.context() as patch:
        patch.setattr(gallery, "save_png", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            draw(tmp_path / "cut")
    assert len(list((tmp_path / "cut" / "pictures").glob("*.png"))) == drawn
    draw(tmp_path / "cut")
    assert content(tmp_path / "cut") == content(whole)


def test_only_parts_that_lack_a_picture_are_drawn_again(
    whole: Path, brush: GenerationSettings, crew: DistributedContext
) -> None:
    before = content(whole)
    (whole / read_gallery(whole)[3].file).unlink()
    told: list[int] = []
    times = {p: p.stat().st_mtime_ns for p in (whole / "pictures").iterdir()}
    generate_to_folder(whole, JOBS, brush, FACTS, crew, told.append)
    assert content(whole) == before
    assert told == [3, 2]
    redrawn = [p.name[:6] for p in sorted((whole / "pictures").iterdir()) if times.get(p) != p.stat().st_mtime_ns]
    assert redrawn == ["000002", "000003"]


@pytest.mark.parametrize("torn", ['{"index": 3, "file": "pictures/0', '{"index": 3}', "\x00\x00\x00"])
def test_a_line_that_a_kill_cut_off_is_drawn_again(tmp_path: Path, whole: Path, draw: Draw, torn: str) -> None:
    draw(tmp_path / "cut")
    lines = (tmp_path / "cut" / "pictures.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "cut" / "pictures.jsonl").write_text("".join(lines[:2]), encoding="utf-8")
    (tmp_path / "cut" / "pictures.rank_0.jsonl").write_text(lines[2] + torn, encoding="utf-8")
    draw(tmp_path / "cut")
    assert content(tmp_path / "cut") == content(whole)


def test_lines_of_several_processes_are_put_in_order(tmp_path: Path, whole: Path, draw: Draw) -> None:
    draw(tmp_path / "cut")
    path = tmp_path / "cut" / "pictures.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.unlink()
    (tmp_path / "cut" / "pictures.rank_1.jsonl").write_text(lines[4] + lines[0], encoding="utf-8")
    (tmp_path / "cut" / "pictures.rank_10.jsonl").write_text(lines[2] + lines[3], encoding="utf-8")
    (tmp_path / "cut" / "pictures.rank_2.jsonl").write_text(lines[1], encoding="utf-8")
    draw(tmp_path / "cut")
    assert content(tmp_path / "cut") == content(whole)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"facts": FACTS | {"step": 10}}, ("step", "9", "10")),
        ({"facts": {"checkpoint": FACTS["checkpoint"]}}, ("step", "9", "'not set'")),
        ({"facts": FACTS | {"weights": "ema"}}, ("weights", "'not set'", "'ema'")),
        ({"negative_prompt": "a two"}, ("negative_prompt", "None", "'a two'")),
        ({"height": 32}, ("height", "None", "32")),
        ({"width": 32}, ("width", "None", "32")),
        ({"jobs": [*JOBS[:4], ImageRequest(prompt="six", seed=4)]}, ("picture 4", "one nine", "six")),
        ({"jobs": [*JOBS[:4], replace(JOBS[4], seed=7)]}, ("picture 4", "seed=4", "seed=7")),
        ({"jobs": JOBS[:4]}, ("picture 4", "one nine", "none")),
    ],
)
def test_other_settings_or_prompts_are_refused_with_both_values_and_nothing_is_lost(
    whole: Path, draw: Draw, refusal_of: RefusalOf, changes: dict[str, Any], told: tuple[str, ...]
) -> None:
    before = content(whole)
    message = refusal_of(lambda: draw(whole, **changes))
    assert all(part in message for part in (*told, str(whole), "--overwrite")), message
    assert content(whole) == before


def test_another_sampler_is_refused(whole: Path, draw: Draw, brush: GenerationSettings, refusal_of: RefusalOf) -> None:
    heun = brush.drawer.settings(num_steps=1, guidance_scale=1.0, sampler="heun")
    assert "have sampler 'euler', now it is 'heun'" in refusal_of(lambda: draw(whole, sample=heun))


def test_a_list_that_goes_on_gives_the_folder_that_the_whole_list_gives(
    tmp_path: Path, whole: Path, draw: Draw
) -> None:
    draw(tmp_path / "grown", JOBS[:3])
    draw(tmp_path / "grown")
    assert content(tmp_path / "grown") == content(whole)


def test_overwriting_removes_its_own_files_and_no_others(whole: Path, draw: Draw) -> None:
    mine = {"notes.txt": b"1", "pictures/holiday.png": b"2", "pictures/000001.png": b"3", "pictures.jsonl.bak": b"4"}
    for name, data in mine.items():
        (whole / name).write_bytes(data)
    for name in ("pictures/000009_half.png.tmp", "pictures/1000000_.png", "pictures.rank_3.jsonl"):
        (whole / name).write_bytes(b"")
    draw(whole, [ImageRequest(prompt="six", seed=7)], FACTS | {"step": 10}, overwrite=True)
    assert {name: data for name, data in content(whole).items() if name in mine} == mine
    assert set(content(whole)) - set(mine) == {"settings.json", "pictures.jsonl", "pictures/000000_six.png"}
    assert [picture.job() for picture in read_gallery(whole)] == [ImageRequest(prompt="six", seed=7)]


def test_nothing_is_removed_for_prompts_that_cannot_be_drawn(whole: Path, draw: Draw, refusal_of: RefusalOf) -> None:
    before = content(whole)
    long = [*JOBS, ImageRequest(prompt="one " * 13, seed=0)]
    assert "13 tokens" in refusal_of(lambda: draw(whole, long, overwrite=True))
    assert "13 tokens" in refusal_of(lambda: draw(whole, overwrite=True, negative_prompt="one " * 13))
    assert content(whole) == before


def test_pictures_of_unknown_settings_are_not_taken_for_ones_own(
    whole: Path, draw: Draw, refusal_of: RefusalOf
) -> None:
    (whole / "settings.json").unlink()
    assert "no settings.json" in refusal_of(lambda: draw(whole))
    assert len(draw(whole, overwrite=True)) == 5


def test_clearing_that_is_cut_short_never_leaves_old_pictures_without_their_settings(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlink, removed = Path.unlink, []

    def unlink_and_see(path: Path, missing_ok: bool = False) -> None:
        unlink(path, missing_ok)
        removed.append(path.name)
        has_pictures = (whole / "pictures.jsonl").exists() or any((whole / "pictures").glob("*.png"))
        assert (whole / "settings.json").exists() or not has_pictures

    monkeypatch.setattr(Path, "unlink", unlink_and_see)
    remove_images(whole)
    assert len(removed) == 7


def test_a_picture_does_not_depend_on_who_is_drawn_beside_it(tmp_path: Path, whole: Path, draw: Draw) -> None:
    others = [ImageRequest(prompt="four pink ones", seed=11), *JOBS[1:3], ImageRequest(prompt="six", seed=12), JOBS[4]]
    draw(tmp_path / "others", others)
    mine, theirs = pixels(whole), pixels(tmp_path / "others")
    assert [np.array_equal(a, b) for a, b in zip(mine, theirs, strict=True)] == [False, True, True, False, True]


def test_every_part_is_drawn_in_batches_of_one_size(
    tmp_path: Path, draw: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, paint = [], GenerationSettings.draw

    def paint_and_count(brush: GenerationSettings, jobs: Sequence[ImageRequest]) -> np.ndarray:
        sizes.append(len(jobs))
        return paint(brush, jobs)

    monkeypatch.setattr(GenerationSettings, "draw", paint_and_count)
    draw(tmp_path / "o")
    draw(tmp_path / "one", batch_size=16)
    assert sizes == [2, 2, 2, 5]


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_the_batch_size_moves_no_pixel_by_more_than_one_grey_level(
    tmp_path: Path, whole: Path, draw: Draw, batch_size: int
) -> None:
    draw(tmp_path / "other", batch_size=batch_size)
    assert np.abs(pixels(tmp_path / "other") - pixels(whole)).max() <= 1
    assert (tmp_path / "other" / "settings.json").read_bytes() == (whole / "settings.json").read_bytes()


@pytest.mark.parametrize(
    "overrides", [("model.routing_pool=batch",), ("model.routing_pool=group", "model.routing_group=2")]
)
def test_where_pictures_compete_for_experts_the_batch_size_is_a_setting(
    tmp_path: Path,
    crew: DistributedContext,
    make_brush: Callable[..., GenerationSettings],
    refusal_of: RefusalOf,
    overrides: tuple[str, ...],
) -> None:
    brush = make_brush(*overrides)
    generate_to_folder(tmp_path / "o", JOBS, brush, FACTS, crew)
    message = refusal_of(lambda: generate_to_folder(tmp_path / "o", JOBS, replace(brush, batch_size=3), FACTS, crew))
    assert "have batch_size 2, now it is 3" in message


def test_all_that_is_drawn_with_is_told(brush: GenerationSettings) -> None:
    renewing = brush.drawer.settings(sampler="euler_ancestral", eta=0.5, guidance_interval=(0.2, 0.8))
    samples = [
        brush.sample,
        renewing,
        replace(renewing, eta=0.6),
        replace(renewing, num_steps=3),
        replace(renewing, guidance_scale=3.0),
        replace(renewing, guidance_interval=(0.3, 0.8)),
        replace(renewing, guidance_interval=(0.2, 0.9)),
        replace(renewing, capacity_factor=1.0),
    ]
    brushes = [replace(brush, sample=sample) for sample in samples]
    brushes += [replace(brush, negative_prompt=""), replace(brush, height=8), replace(brush, width=8)]
    told = [gallery._settings(one, FACTS) for one in brushes] + [gallery._settings(brush, {"step": 9})]
    assert len({json.dumps(one, sort_keys=True) for one in told}) == len(told)
    assert gallery._settings(replace(brush, sample=replace(brush.sample, prompts=("a",))), FACTS) == told[0]


def test_a_folders_identity_is_that_of_its_lines_and_settings_and_not_of_its_place(tmp_path: Path, whole: Path) -> None:
    identity = image_folder_digest(whole)
    whole.rename(tmp_path / "elsewhere")
    assert image_folder_digest(tmp_path / "elsewhere") == identity
    for name in ("pictures.jsonl", "settings.json"):
        path = tmp_path / "elsewhere" / name
        path.write_bytes(path.read_bytes().replace(b"9", b"8") if name == "settings.json" else b"")
        changed = image_folder_digest(tmp_path / "elsewhere")
        assert changed != identity, name
        identity = changed


@pytest.mark.parametrize(("note", "is_other"), [({}, False), ({OF_SCENES: True}, False), ({OF_SCENES: False}, True)])
def test_only_a_folder_that_says_so_is_of_other_pictures(tmp_path: Path, note: dict[str, bool], is_other: bool) -> None:
    assert not is_of_other_pictures(tmp_path)
    (tmp_path / "settings.json").write_text(json.dumps(note))
    assert is_of_other_pictures(tmp_path) is is_other


@pytest.mark.parametrize(
    ("changes", "does"),
    [
        ({}, False),
        ({"ffn": "dense"}, False),
        ({"ffn": "token_choice", "top_k": 2}, True),
        ({"routing_pool": "batch"}, True),
        ({"routing_pool": "group", "routing_group": 2}, True),
    ],
)
def test_pictures_compete_where_a_pool_is_of_several(
    tiny_config: ModelConfig, changes: dict[str, Any], does: bool
) -> None:
    assert shares_routing_pool(replace(tiny_config, **changes)) is does


LINE = {"index": 0, "file": "pictures/000000_a_nine.png", "prompt": "a nine", "seed": 0}


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "null",
        '"x"',
        "",
        "[" * 100_000,
        "{}",
        *(
            json.dumps(LINE | change)
            for change in (
                {"file": "/etc/passwd"},
                {"file": "../x.png"},
                {"file": "pictures/../../x.png"},
                {"file": None},
                {"index": "0"},
                {"index": True},
                {"index": -1},
                {"index": 0.0},
                {"seed": 1.5},
                {"prompt": 7},
            )
        ),
    ],
)
def test_a_line_that_no_drawing_wrote_is_refused_by_its_number(
    tmp_path: Path, draw: Draw, refusal_of: RefusalOf, line: str
) -> None:
    folder = tmp_path / "odd"
    draw(folder, JOBS[:1])
    with (folder / "pictures.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    before = content(folder)
    for action in (lambda: read_gallery(folder), lambda: draw(folder, JOBS[:1])):
        assert f"{folder / 'pictures.jsonl'} line 2: " in refusal_of(action)
    assert content(folder) == before


@pytest.mark.parametrize(
    ("name", "data"), [("pictures.jsonl", b"\xff\n"), ("settings.json", b"\xff"), ("settings.json", b"[]")]
)
def test_a_file_that_is_no_text_or_no_object_is_named(
    whole: Path, draw: Draw, refusal_of: RefusalOf, name: str, data: bytes
) -> None:
    (whole / name).write_bytes(data)
    message = refusal_of(lambda: draw(whole))
    assert str(whole) in message


def test_settings_that_lack_a_key_are_another_works(whole: Path, draw: Draw, refusal_of: RefusalOf) -> None:
    (whole / "settings.json").write_text("{}", encoding="ascii")
    assert "have" in (message := refusal_of(lambda: draw(whole))) and "'not set', now it is" in message


def test_an_empty_prompt_is_named_and_nothing_is_drawn(tmp_path: Path, draw: Draw, refusal_of: RefusalOf) -> None:
    jobs = [ImageRequest(prompt="a nine", seed=0), ImageRequest(prompt=" \t", seed=1)]
    assert "prompt 2 of 2" in refusal_of(lambda: draw(tmp_path / "o", jobs))
    assert not (tmp_path / "o").exists()


def test_a_folder_that_another_command_drew_into_is_not_taken_for_whole(
    tmp_path: Path, draw: Draw, monkeypatch: pytest.MonkeyPatch, refusal_of: RefusalOf
) -> None:
    read = gallery.read_gallery
    monkeypatch.setattr(gallery, "read_gallery", lambda folder: read(folder)[1:])
    assert "another command" in refusal_of(lambda: draw(tmp_path / "o"))


def test_prompts_of_any_characters_come_back_as_they_were(tmp_path: Path, draw: Draw) -> None:
    prompts = ["a\nnine", "a\r\nsix", "one\u2028two\u2029three\x85", "ein schönes 字 🎨", "!", "a" * 300, "\x00\x1b[0m"]
    jobs = [ImageRequest(prompt=prompt, seed=0) for prompt in prompts]
    assert [picture.job() for picture in draw(tmp_path / "o", jobs)] == jobs
    lines = (tmp_path / "o" / "pictures.jsonl").read_text(encoding="utf-8")
    assert lines.isascii() and lines.count("\n") == len(jobs)
    before = content(tmp_path / "o")
    draw(tmp_path / "o", jobs)
    assert content(tmp_path / "o") == before
    raw = "".join(json.dumps(json.loads(line), ensure_ascii=False) + "\n" for line in lines.splitlines())
    (tmp_path / "o" / "pictures.jsonl").write_text(raw, encoding="utf-8")  # as other programs write JSON
    assert [picture.job() for picture in read_gallery(tmp_path / "o")] == jobs


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, draw: Draw, refusal_of: RefusalOf) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    for overwrite in (False, True):
        assert "file" in refusal_of(lambda: draw(tmp_path / "file", overwrite=overwrite))  # noqa: B023
        assert "file" in refusal_of(lambda: draw(tmp_path / "file" / "below", overwrite=overwrite))  # noqa: B023
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "pictures").write_text("mine", encoding="utf-8")
    assert str(tmp_path / "o" / "pictures") in refusal_of(lambda: draw(tmp_path / "o"))


def test_a_full_disk_ends_the_work_at_once_and_what_was_drawn_stays(
    tmp_path: Path, whole: Path, draw: Draw, monkeypatch: pytest.MonkeyPatch, refusal_of: RefusalOf
) -> None:
    save_png, tried = gallery.save_png, []

    def save_until_full(image: np.ndarray, path: Path) -> None:
        tried.append(path)
        if len(tried) > 2:
            raise OSError(28, "No space left on device", str(path))
        save_png(image, path)

    with monkeypatch.context() as patch:
        patch.setattr(gallery, "save_png", save_until_full)
        assert "000002_red_nine.png: No space left" in refusal_of(lambda: draw(tmp_path / "full"))
    assert len(tried) == 3
    draw(tmp_path / "full")
    assert content(tmp_path / "full") == content(whole)


def test_what_is_not_there_is_named(tmp_path: Path, whole: Path, refusal_of: RefusalOf) -> None:
    assert "holds no pictures" in refusal_of(lambda: read_gallery(tmp_path / "none"))
    first = read_gallery(whole)[0]
    (whole / first.file).write_bytes(b"no picture")
    assert first.file in refusal_of(lambda: read_picture(whole, first))
    (whole / first.file).unlink()
    assert "picture 0 is not there" in refusal_of(lambda: read_gallery(whole))


def test_alone_every_agreement_is_ones_own(crew: DistributedContext) -> None:
    assert (crew.world.size, crew.world.rank, crew.is_rank0, crew.is_tp_leader) == (1, 0, True, True)
    assert crew.world.share("x") == ["x"]
    assert crew.world.on_rank0(lambda: 1) == crew.world.run_on_all(lambda: 1) == 1
    with pytest.raises(DataError):
        crew.world.run_on_all(lambda: read_gallery(Path("none")))
    with pytest.raises(TopologyError):
        init_ranks(tp=2)
