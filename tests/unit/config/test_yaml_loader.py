"""Recipes on disk: what is written is what is read, and every mistake is one line with file, key and value."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from ecdit_ds.config.recipe import Recipe, SampleConfig
from ecdit_ds.config.yaml_loader import (
    DEFAULT_RECIPE,
    RECIPE_FOLDER,
    dump_recipe,
    find_recipe,
    load_recipe,
    parse_yaml,
    recipe_from_dict,
    recipe_names,
)

RefusalOf = Callable[[Callable[[], object]], str]
WriteRecipe = Callable[[dict[str, Any]], Path]


@pytest.fixture
def recipe_path(tmp_path: Path, tiny_recipe: Recipe) -> Path:
    """Return the file of the tiny recipe."""
    path = tmp_path / "mine.yaml"
    path.write_text(dump_recipe(tiny_recipe))
    return path


@pytest.fixture
def write_recipe(recipe_path: Path, tiny_recipe: Recipe) -> WriteRecipe:
    """Return a function that writes the tiny recipe with dotted keys set to any value."""

    def write(changes: dict[str, Any]) -> Path:
        data = tiny_recipe.to_dict()
        for key, value in changes.items():
            *sections, leaf = key.split(".")
            (data[sections[0]] if sections else data)[leaf] = value
        recipe_path.write_text(yaml.safe_dump(data))
        return recipe_path

    return write


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_reads_back_as_it_was_written(name: str, tmp_path: Path) -> None:
    recipe, copy = load_recipe(name), tmp_path / "copy.yaml"
    copy.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(str(copy)) == recipe
    assert recipe_from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_named_after_its_file(name: str) -> None:
    assert load_recipe(name).name == name
    assert find_recipe(name).parent == RECIPE_FOLDER


def test_the_default_recipe_exists() -> None:
    assert load_recipe() == load_recipe(DEFAULT_RECIPE)


@pytest.mark.parametrize(
    "prompt",
    ["1e-4", "2E5", "1.5", "7", "no", "null", "~", "2026-01-01", "", " red ", "a: b", "# red", "a\nb", "f\u00fcnf"],
)
def test_any_text_reads_back_as_the_same_text(prompt: str, tiny_recipe: Recipe) -> None:
    recipe = replace(tiny_recipe, sample=SampleConfig(prompts=(prompt,)))
    assert recipe_from_dict(parse_yaml(dump_recipe(recipe))) == recipe


@pytest.mark.parametrize("number", [1e-4, 1e-8, 1e16, 0.1, 123456.789])
def test_any_number_reads_back_as_the_same_number(number: float, tiny_recipe: Recipe) -> None:
    recipe = replace(tiny_recipe, optimizer=replace(tiny_recipe.optimizer, learning_rate=number))
    assert recipe_from_dict(parse_yaml(dump_recipe(recipe))) == recipe


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E-4", 1e-4),
        ("1.e-4", 1e-4),
        ("+2e3", 2e3),
        ("-.5e1", -5.0),
        ("1.5e-3", 1.5e-3),
        ("2e0", 2.0),
        ("3", 3),
        ("0.5", 0.5),
        ("e4", "e4"),
        ("1e", "1e"),
        ("'1e-4'", "1e-4"),
        ("1e-4x", "1e-4x"),
    ],
)
def test_exponents_are_numbers_with_or_without_a_point(text: str, value: object) -> None:
    parsed = parse_yaml(f"key: {text}")["key"]
    assert parsed == value
    assert type(parsed) is type(value)


def test_one_ten_thousandth_is_a_number_in_the_file_and_on_the_command_line(recipe_path: Path) -> None:
    text = recipe_path.read_text().replace("learning_rate: 0.0001", "learning_rate: 3e-4")
    recipe_path.write_text(text)
    assert load_recipe(str(recipe_path)).optimizer.learning_rate == 3e-4
    overridden = load_recipe(str(recipe_path), ["optimizer.learning_rate=5e-4"])
    assert overridden.optimizer.learning_rate == 5e-4


def test_a_whole_number_will_do_for_a_float(recipe_path: Path) -> None:
    guidance_scale = load_recipe(str(recipe_path), ["sample.guidance_scale=3"]).sample.guidance_scale
    assert guidance_scale == 3.0
    assert isinstance(guidance_scale, float)


def test_a_recipe_without_a_name_takes_its_files(tmp_path: Path, recipe_path: Path) -> None:
    data = yaml.safe_load(recipe_path.read_text())
    del data["name"]
    (tmp_path / "long_run.yaml").write_text(yaml.safe_dump(data))
    assert load_recipe(str(tmp_path / "long_run.yaml")).name == "long_run"


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("trian", {"max_steps": 3}, ["trian: {'max_steps': 3}", "did you mean train?"]),
        ("model.num_layer", 3, ["model.num_layer: 3", "did you mean model.num_layers?"]),
        ("flow.sigma", 0.5, ["flow.sigma: 0.5", "timestep_density", "timestep_shift"]),
        ("train.max_steps", "many", ["train.max_steps: 'many'", "whole number"]),
        ("train.max_steps", 1.5, ["train.max_steps: 1.5", "whole number"]),
        ("train.max_steps", True, ["train.max_steps: True", "whole number"]),
        ("train.max_steps", None, ["train.max_steps: None", "whole number"]),
        ("train.micro_batch_size", 2.5, ["train.micro_batch_size: 2.5", "whole number", "auto"]),
        ("train.micro_batch_size", "atuo", ["train.micro_batch_size: 'atuo'", "auto"]),
        ("optimizer.learning_rate", "fast", ["optimizer.learning_rate: 'fast'", "number"]),
        ("optimizer.learning_rate", True, ["optimizer.learning_rate: True", "number"]),
        ("flow.timestep_density", "uniformm", ["flow.timestep_density: 'uniformm'", "did you mean uniform?"]),
        ("model.ffn", "moe", ["model.ffn: 'moe'", "dense", "expert_choice", "token_choice"]),
        ("model.ffn", ["dense"], ["model.ffn: ['dense']", "expert_choice"]),
        ("sample.prompts", "a red seven", ["sample.prompts: 'a red seven'", "list"]),
        ("sample.prompts", ["a red seven", 7], ["sample.prompts[1]: 7", "text"]),
        ("name", 3, ["name: 3", "text"]),
        ("model", 3, ["model: 3", "section"]),
        ("data", None, ["data: None", "section"]),
        ("train.global_batch_size", 0, ["train.global_batch_size: 0"]),
    ],
)
def test_a_mistake_in_the_file_is_reported_with_file_key_and_value(
    key: str, value: object, said: list[str], write_recipe: WriteRecipe, refusal_of: RefusalOf
) -> None:
    path = write_recipe({key: value})
    message = refusal_of(lambda: load_recipe(str(path)))
    assert message.startswith(f"{path}: ")
    assert all(part in message for part in said), message


@pytest.mark.parametrize("key", ["model", "train", "model.hidden_size", "train.max_steps"])
def test_a_missing_key_without_a_default_is_named(key: str, recipe_path: Path, refusal_of: RefusalOf) -> None:
    data = yaml.safe_load(recipe_path.read_text())
    *sections, leaf = key.split(".")
    del (data[sections[0]] if sections else data)[leaf]
    recipe_path.write_text(yaml.safe_dump(data))
    assert f"{recipe_path}: {key}: is missing" in refusal_of(lambda: load_recipe(str(recipe_path)))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"model:\n  num_layers: 2\n  num_heads: 4\n  num_layers: 6\n", ["line 4", "num_layers", "line 2"]),
        (b"train: {max_steps: 1}\nname: a\ntrain: {max_steps: 2}\n", ["line 3", "train", "line 1"]),
        (b"7: 3\n", ["line 1", "7", "not a name"]),
        (b"? [a, b]\n: 3\n", ["line 1", "['a', 'b']", "not a name"]),
        (b'"max\\nsteps": 3\n', ["max"]),
        (b"", ["not a recipe"]),
        (b"- model\n- train\n", ["list", "not a recipe"]),
        (b"just words\n", ["str", "not a recipe"]),
        (b"model: {hidden_size: 3\n", ["not valid YAML", "line"]),
        (b"model:\n\thidden_size: 3\n", ["not valid YAML", "line 2"]),
        (b"a: 1\n---\na: 2\n", ["not valid YAML", "document"]),
        (b"name: !!python/object/apply:os.getcwd []\n", ["not valid YAML", "python/object"]),
        (b"name: \x00\n", ["not valid YAML"]),
        (b"name: 2026-13-45\n", ["not valid YAML", "month"]),
        (b"name: !!int 0b_\n", ["not valid YAML"]),
        (b"name: !!int seven\n", ["not valid YAML", "seven"]),
        (b"name: !!timestamp seven\n", ["not valid YAML"]),
        (b"name: " + b"[" * 5000, ["not valid YAML"]),
        (b"name: \xff\xfe\n", ["cannot be read as text", "utf-8"]),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_in_one_line(
    content: bytes, said: list[str], tmp_path: Path, refusal_of: RefusalOf
) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    message = refusal_of(lambda: load_recipe(str(path)))
    assert message.startswith(f"{path}: ")
    assert all(part in message for part in said), message


@pytest.mark.parametrize("given", ["no_such_recipe", "folder/none.yaml", ""])
def test_a_recipe_that_is_nowhere_is_refused_with_those_that_exist(given: str, refusal_of: RefusalOf) -> None:
    message = refusal_of(lambda: load_recipe(given))
    assert f"--config {given}: " in message
    assert all(name in message for name in recipe_names())


def test_a_misspelt_recipe_name_is_answered_with_the_nearest(refusal_of: RefusalOf) -> None:
    assert "did you mean demo?" in refusal_of(lambda: load_recipe("dmeo"))


def test_a_folder_is_refused_as_a_recipe(tmp_path: Path, refusal_of: RefusalOf) -> None:
    message = refusal_of(lambda: load_recipe(str(tmp_path)))
    assert str(tmp_path) in message
    assert "neither a file nor a recipe" in message


def test_overrides_reach_every_depth_and_the_last_one_wins(recipe_path: Path) -> None:
    overrides = [
        "train.max_steps=7",
        "name=other",
        "sample.prompts=[a red seven, two blue ones]",
        "train.max_steps=9",
        "model.ffn=dense",
        "flow={text_dropout_prob: 0.5}",
        "train.micro_batch_size=4",
    ]
    recipe = load_recipe(str(recipe_path), overrides)
    assert (recipe.name, recipe.train.max_steps, recipe.train.micro_batch_size) == ("other", 9, 4)
    assert recipe.sample.prompts == ("a red seven", "two blue ones")
    assert recipe.model.ffn == "dense"
    assert recipe.flow.text_dropout_prob == 0.5


def test_overrides_may_open_a_section_that_the_file_leaves_out(recipe_path: Path) -> None:
    data = yaml.safe_load(recipe_path.read_text())
    del data["optimizer"]
    recipe_path.write_text(yaml.safe_dump(data))
    assert load_recipe(str(recipe_path), ["optimizer.warmup_steps=5"]).optimizer.warmup_steps == 5


def test_overrides_are_judged_together_not_one_by_one(recipe_path: Path) -> None:
    """Three experts alone would not divide into three ranks, nor three ranks alone divide four experts."""
    recipe = load_recipe(str(recipe_path), ["parallel.ep=3", "model.num_experts=3"])
    assert (recipe.parallel.ep, recipe.model.num_experts) == (3, 3)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.max_steps", ["--set train.max_steps", "key=value"]),
        ("=3", ["--set =3", "key=value"]),
        ("", ["--set", "key=value"]),
        ("train.max_step=3", ["--set", "train.max_step: 3", "did you mean train.max_steps?"]),
        ("train.max_steps=many", ["--set", "train.max_steps: 'many'", "whole number"]),
        ("train.max_steps=", ["--set", "train.max_steps: None", "whole number"]),
        ("train.max_steps=2026-13-45", ["--set train.max_steps=2026-13-45", "not valid YAML"]),
        ("train.max_steps.deep=3", ["--set train.max_steps.deep=3", "max_steps is a value"]),
        ("model=3", ["--set", "model: 3", "section"]),
        ("model={num_layers: 2", ["--set model={num_layers: 2", "not valid YAML"]),
        ("flow={logit_std: 1, logit_std: 2}", ["--set flow=", "logit_std", "twice"]),
        ("parallel.ep=3", ["--set", "parallel.ep(3)", "model.num_experts(4)", "1, 2, 4"]),
    ],
)
def test_a_mistake_in_an_override_is_reported_with_key_and_value(
    override: str, said: list[str], recipe_path: Path, refusal_of: RefusalOf
) -> None:
    message = refusal_of(lambda: load_recipe(str(recipe_path), [override]))
    assert all(part in message for part in said), message


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("017", 17),
        ("-017", -17),
        ("0", 0),
        ("0o17", 15),
        ("0x1F", 31),
        ("1_000", 1000),
        ("1:30", "1:30"),
        ("190:20:30", "190:20:30"),
        ("1:30.5", "1:30.5"),
        ("0b11", "0b11"),
        ("1e-4", 1e-4),
        ("1_0.5", 10.5),
        (".5", 0.5),
        ("5.", 5.0),
        ("08.5", 8.5),
        ("08", 8),
        ("-.inf", -math.inf),
        ("+1", 1),
        ("0x", "0x"),
        ("_1", "_1"),
    ],
)
def test_numbers_are_those_of_yaml_1_2(text: str, value: object) -> None:
    read = parse_yaml(text)
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    "text", ["017", "1:30", "0o17", "0b11", "1e4", "1_000", "08", "0x1F", "1.", ".inf", "nan", "~", "yes", "1.5e"]
)
def test_a_text_that_looks_like_a_number_is_written_as_text(text: str, tmp_path: Path, tiny_recipe: Recipe) -> None:
    recipe = replace(tiny_recipe, sample=replace(tiny_recipe.sample, prompts=(text,)))
    (tmp_path / "copy.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(str(tmp_path / "copy.yaml")) == recipe


@pytest.mark.parametrize("text", ["9" * 5000, "0x" + "f" * 100_000, "-" + "9" * 41])
def test_a_number_of_very_many_digits_is_refused_in_a_short_line(
    text: str, recipe_path: Path, refusal_of: RefusalOf
) -> None:
    message = refusal_of(lambda: load_recipe(str(recipe_path), [f"train.max_steps={text}"]))
    assert f"{len(text)} digits" in message or "is a number of" in message
    assert len(message.removeprefix(f"--set train.max_steps={text}")) < 500


@pytest.mark.parametrize("opening", ["[", "{a: ", "- ", "? "])
@pytest.mark.parametrize("count", [40, 5000, 300_000])
def test_sections_within_sections_without_end_are_refused(opening: str, count: int, refusal_of: RefusalOf) -> None:
    """The loader of libyaml would overflow its stack, which ends the process."""
    assert "within each other" in refusal_of(lambda: parse_yaml(opening * count))


def test_many_prompts_are_read_by_the_library_in_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [f"prompt {i}" for i in range(2000)]
    (tmp_path / "many.yaml").write_text(yaml.safe_dump({"base": "demo", "sample": {"prompts": prompts}}))
    monkeypatch.setattr(yaml.scanner.Scanner, "fetch_more_tokens", None)  # of the one in Python, twenty times slower
    assert load_recipe(str(tmp_path / "many.yaml")).sample.prompts == tuple(prompts)


def _bomb(levels: int) -> str:
    """Return YAML of nine lines each of which names the one before nine times: 9^levels values."""
    lines = ["a0: &a0 [x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels)]
    return "{" + ", ".join(lines) + "}"


@pytest.mark.parametrize(
    "key",
    [
        "bomb",
        "train",
        "train.bomb",
        "train.max_steps",
        "train.micro_batch_size",
        "model.ffn",
        "sample.prompts",
        "name",
        "base",
    ],
)
def test_a_value_that_would_take_years_to_write_out_is_refused_in_a_short_line(
    key: str, tmp_path: Path, refusal_of: RefusalOf
) -> None:
    """A YAML file of a kilobyte whose aliases stand for 9^40 values."""
    section, _, leaf = key.partition(".")
    value = f"{{{leaf}: {_bomb(40)}}}" if leaf else _bomb(40)
    path = tmp_path / "bomb.yaml"
    path.write_text(f"base: demo\n{section}: {value}\n" if key != "base" else f"base: {value}\n")
    message = refusal_of(lambda: load_recipe(str(path)))
    assert f"{key.split('.')[0]}" in message
    assert len(message) < 1000


def test_a_recipe_may_stand_on_a_file_beside_it(tmp_path: Path, tiny_recipe: Recipe) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "ground.yaml").write_text(dump_recipe(tiny_recipe))
    (tmp_path / "deep" / "middle.yaml").write_text("base: ../ground.yaml\ntrain: {max_steps: 77, log_every: 3}\n")
    (tmp_path / "top.yaml").write_text("base: deep/middle.yaml\ntrain: {max_steps: 78}\n")
    recipe = load_recipe(str(tmp_path / "top.yaml"))
    train = replace(tiny_recipe.train, max_steps=78, log_every=3)
    assert recipe == replace(tiny_recipe, name="top", train=train)


def test_a_base_by_name_is_the_recipe_of_that_name_though_a_file_has_it_too(tmp_path: Path) -> None:
    (tmp_path / "demo").write_text("name: other\n")
    (tmp_path / "mine.yaml").write_text("base: demo\n")
    assert load_recipe(str(tmp_path / "mine.yaml")) == replace(load_recipe("demo"), name="mine")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"a": "b.yaml", "b": "a.yaml"}, "leads back"),
        ({"a": "a.yaml"}, "leads back"),
        ({"a": "sub/../a.yaml"}, "leads back"),
        ({"a": "link.yaml"}, "leads back"),
        ({"a": "none.yaml"}, "base: 'none.yaml' is neither a file in"),
        ({"a": "."}, "base: '.' is neither a file in"),
        ({"a": "7"}, "base: 7 is neither"),
        ({f"{chr(97 + i)}": f"{chr(98 + i)}.yaml" for i in range(10)}, "write some of them as one file"),
    ],
)
def test_a_base_that_is_no_ground_is_refused(
    files: dict[str, str], said: str, tmp_path: Path, refusal_of: RefusalOf
) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "link.yaml").symlink_to(tmp_path / "a.yaml")
    for name, base in files.items():
        (tmp_path / f"{name}.yaml").write_text(f"base: {base}\n")
    assert said in refusal_of(lambda: load_recipe(str(tmp_path / "a.yaml")))


@pytest.mark.parametrize("end", ["x", ".x", "e", ".5."])
@pytest.mark.parametrize("digits", ["1", "1_", "+1"])
def test_a_text_that_begins_as_a_long_number_does_is_read_before_the_suite_times_out(digits: str, end: str) -> None:
    text = digits * 150_000 + end
    assert parse_yaml(text) == text


@pytest.mark.parametrize("start", ["train: &a {b: *a}", "a: &a {x: 1}\nb: {y: *a, z: *a}"])
def test_a_section_that_stands_for_another_is_refused(start: str, tmp_path: Path, refusal_of: RefusalOf) -> None:
    (tmp_path / "below.yaml").write_text(start)
    path = tmp_path / "mine.yaml"
    path.write_text(f"base: below.yaml\n{start}")
    assert "*a repeats a section; write it out" in refusal_of(lambda: load_recipe(str(path)))
    assert parse_yaml("a: &a [1, 2]\nb: *a") == {"a": [1, 2], "b": [1, 2]}


@pytest.mark.parametrize(
    "text", ['!!float ""', "!!bool maybe", "!!int x", "!!timestamp x", "!!binary ?", "!!set {a, b}"]
)
def test_a_tag_that_its_text_does_not_bear_out_is_one_line(text: str, recipe_path: Path, refusal_of: RefusalOf) -> None:
    with recipe_path.open("a") as file:
        file.write(f"odd: {text}\n")
    assert str(recipe_path) in refusal_of(lambda: load_recipe(str(recipe_path)))
