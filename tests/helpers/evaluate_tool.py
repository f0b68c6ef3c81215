"""tools/evaluate.py as its `__main__` in this process, on random tiny models."""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ecdit_ds.config.recipe import Recipe

TOOLS = Path(__file__).resolve().parents[2] / "tools"
MakeRecipe = Callable[..., Recipe]
SaveModel = Callable[..., Path]


class EvaluateTool:
    """Runs the tools in a folder of their own."""

    def __init__(
        self, folder: Path, checkpoint: Path, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]
    ) -> None:
        self.folder, self.checkpoint = folder, checkpoint
        self._patch, self._capture = patch, capture
        self.printed = ""

    def run(self, *flags: object, tool: str = "evaluate.py") -> tuple[int, list[str]]:
        """Return exit code and stderr's lines; what was printed is in `printed`."""
        path = str(TOOLS / tool)
        self._patch.setattr(sys, "argv", [path, *map(str, flags)])
        self._patch.setattr(sys, "path", list(sys.path))
        self._patch.chdir(self.folder)
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(path, run_name="__main__")
        captured = self._capture.readouterr()
        self.printed = captured.out
        return int(ended.value.code or 0), captured.err.splitlines()

    def score(self, metric: str, *flags: object, output: str = "o") -> dict[str, Any]:
        """Return what results.json says of the checkpoint, or of --pictures."""
        source = () if "--pictures" in flags else ("--checkpoint", self.checkpoint)
        code, lines = self.run(metric, *source, *flags, "--output", output)
        assert code == 0, lines
        content: dict[str, Any] = json.loads((self.folder / output / "results.json").read_text(encoding="utf-8"))
        return content

    def refusal(self, *flags: object) -> str:
        """Return the one line that the tool refuses with."""
        code, lines = self.run(*flags)
        assert (code, len(lines)) == (2, 1), lines
        assert lines[0].startswith("error: ")
        return lines[0]

    def draw(self, *prompts: str, output: str = "pictures") -> Path:
        """Draw pictures with tools/sample.py, and return their folder."""
        flags = [part for prompt in prompts for part in ("--prompt", prompt)]
        code, lines = self.run(
            "--checkpoint", self.checkpoint, "--output", output, "--steps", 1, *flags, tool="sample.py"
        )
        assert (code, lines) == (0, [])
        return self.folder / output


def content(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
