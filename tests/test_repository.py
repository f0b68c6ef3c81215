"""What the repository promises: pinned requirements, recipes that load, names that hide nothing, a true README."""

import importlib.metadata
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from ecdit_ds.config.deepspeed_json import load_deepspeed_config
from ecdit_ds.config.yaml_loader import load_recipe, recipe_names

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "ecdit_ds"


def requirements() -> dict[str, str]:
    """Return `{distribution: the rest of its line}` of requirements.txt."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    stripped = [line.partition("#")[0].strip() for line in lines]
    return {line.split("==")[0]: line for line in stripped if line}


def test_every_requirement_is_pinned_to_one_version() -> None:
    assert len(requirements()) >= 15
    for line in requirements().values():
        assert re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][A-Za-z0-9.+]*", line), line


def test_all_that_is_installed_is_locked_by_hash() -> None:
    entries = (ROOT / "requirements.lock").read_text(encoding="utf-8").replace("\\\n", "").splitlines()
    locked: dict[str, str] = {}
    for entry in entries:
        if entry.startswith("#"):
            continue
        told, *hashes = re.split(r"\s+--hash=sha256:", entry)
        assert hashes and all(re.fullmatch("[0-9a-f]{64}", found) for found in hashes), entry
        requirement = Requirement(told)
        if requirement.marker is None or requirement.marker.evaluate():
            locked[canonicalize_name(requirement.name)] = str(requirement.specifier)
    asked = {canonicalize_name(name): f"=={line.split('==')[1]}" for name, line in requirements().items()}
    assert asked.items() <= locked.items(), "run make lock"
    if not (Path(sys.prefix) / "installed").exists():
        pytest.skip("this environment was not made by make")
    here = [sysconfig.get_path("purelib")]  # setuptools brings copies of others' packages, for itself
    installed = {
        canonicalize_name(found.name): f"=={Version(found.version).public}"
        for found in importlib.metadata.distributions(path=here)
        if found.name != "pip"
    }
    assert "torch" in installed
    assert installed.items() <= locked.items()


HANGS = """
import threading

def test_that_waits_for_a_thread_that_waits():
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    threading.Event().wait()

def test_after_it():
    pass
"""


def test_a_test_that_hangs_fails_with_all_stacks_and_the_next_one_runs(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    assert 60 <= float(request.config.getini("timeout")) <= 3600
    path = tmp_path / "test_hanging.py"
    path.write_text(HANGS)
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "-o", "timeout=1", str(path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed, 1 passed" in done.stdout
    assert "Timeout" in done.stdout and "Stack of Thread" in done.stdout + done.stderr


def test_no_file_of_ours_hides_a_library_when_run_by_path() -> None:
    distributions = {name.lower() for name in requirements()}
    libraries = {
        package
        for package, owners in importlib.metadata.packages_distributions().items()
        if distributions & {owner.lower() for owner in owners}
    }
    assert {"torch", "yaml", "PIL", "sklearn"} <= libraries
    ours = {path.stem for path in (ROOT / PACKAGE).iterdir()}
    assert {"config", "train", "model"} <= ours
    assert sorted(ours & (libraries | sys.stdlib_module_names)) == []


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.name)
def test_a_deepspeed_configuration_serves_the_demo(path: Path) -> None:
    config = load_deepspeed_config(path, load_recipe("demo"), dp_size=2)
    assert config["train_batch_size"] == config["train_micro_batch_size_per_gpu"] * 2
    assert str(config["zero_optimization"]["stage"]) in path.stem


def test_there_are_deepspeed_configurations_and_recipes_to_check() -> None:
    assert len(list((ROOT / "ds_configs").glob("*.json"))) >= 2
    assert "demo" in recipe_names()


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_loads_and_is_named_after_its_file(name: str) -> None:
    assert load_recipe(name).name == name


def readme_tree(text: str) -> set[str]:
    """Return the paths in the README's tree: the one fenced block with a line that starts with the package's folder.

    A line is an indent (spaces or drawn branches), one or several names, two spaces or more, and a note. A name with
    a trailing slash is the folder of the deeper lines after it; deeper lines after a file go on with its note.
    """
    fenced = re.findall(r"```[a-z]*\n(.*?)```", text, re.S)
    (tree,) = [block for block in fenced if re.search(rf"^\W*{PACKAGE}/", block, re.M)]
    paths: set[str] = set()
    parents: list[tuple[int, str]] = []
    for line in tree.splitlines():
        bare = re.sub(r"[\u2500-\u257f|`]|--", " ", line)
        indent, names = len(bare) - len(bare.lstrip()), re.split(r"\s{2,}|\s#", bare.strip())[0].split()
        while parents and parents[-1][0] >= indent:
            parents.pop()
        above = parents[-1][1] if parents else ""
        if not names or (above and not above.endswith("/")):
            continue
        paths |= {above + name.rstrip(",") for name in names}
        parents.append((indent, above + names[-1]))
    return paths


def test_a_tree_is_read_with_its_folders_and_without_its_notes() -> None:
    plain = """
Makefile README.md   two files
ecdit_ds/
  train.py    entry
              of all
  data/       x
    a.py
"""
    drawn = """
Makefile README.md
ecdit_ds/          # x
\u251c\u2500\u2500 train.py       # entry
\u2514\u2500\u2500 data/
    \u2514\u2500\u2500 a.py
"""
    paths = {"Makefile", "README.md", "ecdit_ds/", "ecdit_ds/train.py", "ecdit_ds/data/", "ecdit_ds/data/a.py"}
    for tree in (plain, drawn):
        assert readme_tree(f"# Title\n```bash\nmake demo\n```\n```text{tree}```\n") == paths


def test_the_readme_shows_the_house_as_it_is() -> None:
    readme = ROOT / "README.md"
    assert readme.is_file(), "README.md is missing"
    shown = readme_tree(readme.read_text(encoding="utf-8"))
    assert len(shown) >= 20
    missing = [path for path in shown if not any(ROOT.glob(path.rstrip("/")))]
    assert missing == []

    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    tracked = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(tracked) >= 40
    existing = [Path(name) for name in tracked if (ROOT / name).exists()]
    wanted = {path.parts[0] for path in existing if path.parts[0] != readme.name and path.name[0] != "."}
    wanted |= {"/".join(path.parts[:2]) for path in existing if path.parts[0] == PACKAGE and path.name != "__init__.py"}
    drawn = {part for path in shown for part in (path.rstrip("/"), path.split("/")[0])}
    assert sorted(name for name in wanted if name not in drawn) == []


def test_each_promise_of_security_names_tests_that_are_there() -> None:
    rows = [
        line.split("|") for line in (ROOT / "SECURITY.md").read_text(encoding="utf-8").splitlines() if "test_" in line
    ]
    named = [re.findall(r"`([\w/]*test_\w+)`", row[3]) for row in rows]
    assert len(rows) >= 10 and all(named)
    assert [name for names in named for name in names if not (ROOT / "tests" / f"{name}.py").is_file()] == []
