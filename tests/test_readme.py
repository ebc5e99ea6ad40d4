"""What the README tells people to type exists; its tree is the package's, its table of settings that of `config.py`.

`python tests/test_readme.py` writes tree and table into the README.
"""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from savant_ray.config import setting_rows
from savant_ray.settings.yaml_text import show

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *(ROOT / name for name in ("CONTRIBUTING.md", "docs/HOW_IT_WORKS.md", "docs/DESIGN.md"))]
# Programs that are not ours to check.
ELSEWHERE = set("sudo git cd source conda export chmod kubectl prometheus grafana tensorboard".split())
TABLE = re.compile(r"(<!-- The settings:[^\n]*-->\n\n)(.*?)(\n<!-- End of the settings)", re.DOTALL)
TREE = re.compile(r"(<!-- The tree:[^\n]*-->\n```text\n)(.*?)(```\n<!-- End of the tree)", re.DOTALL)


# --- what the README says


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def commands() -> Iterator[list[str]]:
    """Every command of every page, as words; a command that is handed on to Ray comes apart."""
    for page in PAGES:
        for words in split_commands("".join(blocks(page, "sh")).replace("\\\n", " ")):
            if words[:1] == ["ray"] and "--" in words:
                separator = words.index("--")
                yield from (words[:separator], words[separator + 1 :])
            elif words:
                yield words


def split_commands(script: str) -> Iterator[list[str]]:
    """A command a line, or more lines where a quotation spans them."""
    begun = ""
    for line in script.splitlines():
        begun += line
        try:
            yield shlex.split(begun, comments=True)
        except ValueError:  # the quotation is not closed yet
            begun += "\n"
        else:
            begun = ""
    assert not begun, f"never closed: {begun}"


def without_environment(words: list[str]) -> list[str]:
    return words[1:] if re.fullmatch(r"[A-Z_]+=.*", words[0]) else words


# --- what there is


@cache
def savant(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from savant_ray.cli import main; sys.exit(main())"
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)


@cache
def settings() -> frozenset[str]:
    """The dotted names that `savant config` prints."""
    shown = savant("config")
    assert shown.returncode == 0, shown.stderr
    sections = yaml.safe_load(shown.stdout)
    return frozenset(f"{section}.{name}" for section, values in sections.items() for name in values)


@cache
def make_targets() -> frozenset[str]:
    return frozenset(re.findall(r"^([a-z-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))


def check_savant(name: str, options: list[str]) -> None:
    usage = savant(name, "--help")
    assert usage.returncode == 0, f"savant {name}: {usage.stderr}"
    for option in (word for word in options if word.startswith("--")):
        known = option.removeprefix("--") in settings() if "." in option else option in usage.stdout
        assert known, f"savant {name} has no {option}"


def check_ray(words: list[str]) -> None:
    """Ray has the command, with these options."""
    from ray.scripts.scripts import cli

    command: Any = cli
    while hasattr(command, "commands"):
        assert words[0] in command.commands, f"ray has no {words[0]}"
        command, *words = command.commands[words[0]], *words[1:]
    known = {name for parameter in command.params for name in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known, f"{command.name}: {words}"


def check(words: list[str]) -> None:
    program, *rest = without_environment(words)
    if program == "make":
        variables = {word.split("=")[0] for word in rest if "=" in word}
        assert {word for word in rest if "=" not in word} <= make_targets(), words
        assert all(f"\n{name} ?=" in (ROOT / "Makefile").read_text() for name in variables), words
    elif program == "python" and rest[0].startswith("jobs/"):
        assert (ROOT / rest[0]).is_file(), f"{rest[0]} does not exist"
        check_savant(Path(rest[0]).stem, rest[1:])
    elif program == "savant":
        check_savant(rest[0], rest[1:])
    elif program == "ray":
        check_ray(rest)
    else:
        assert program in ELSEWHERE or (ROOT / rest[0]).is_file(), f"{words}: not a command that this test knows"


@pytest.mark.parametrize("words", list(commands()), ids=" ".join)
def test_a_command_can_be_typed_as_it_stands(words):
    check(words)
    for name in words:
        if name.startswith(("configs/", "jobs/", "tests/", "savant_ray/")):
            assert (ROOT / name).is_file(), f"{name} does not exist"


def test_files_that_the_text_names_exist():
    for page in PAGES:
        names = re.findall(r"`((?:savant_ray|configs|jobs|tests)/[\w./]+|[\w.]+\.(?:txt|toml|yml))`", page.read_text())
        of_a_run = {"training_log.txt", "error_traceback.txt"}
        missing = [name for name in names if not (ROOT / name).exists() and name not in of_a_run]
        assert missing == [], page.name
        links = re.findall(r"\]\((\w[\w./]+)\)", page.read_text())
        assert [link for link in links if not (page.parent / link).exists()] == []


def test_settings_that_the_text_names_are_known():
    sections = {name.split(".")[0] for name in settings()}
    for page in PAGES:
        named = re.findall(r"`(?:--)?(\w+\.\w+)[ `]", page.read_text())
        assert [n for n in named if n.split(".")[0] in sections and n not in settings()] == [], page.name


def test_settings_in_yaml_and_environment_are_known():
    for block in blocks(README, "yaml"):
        for section, values in yaml.safe_load(block).items():
            assert [name for name in values if f"{section}.{name}" not in settings()] == []
    for section, name in re.findall(r"SAVANT_([A-Z]+)__([A-Z_]+)=", README.read_text()):
        assert f"{section}.{name}".lower() in settings()


def test_make_targets_that_the_text_names_exist():
    for page in PAGES:
        named = re.findall(r"`make ([a-z-]+)", page.read_text())
        assert [target for target in named if target not in make_targets()] == [], page.name


def test_the_readme_names_the_apt_packages_that_ci_installs():
    line = next(line for line in README.read_text().splitlines() if line.startswith("sudo apt install"))
    for package in re.findall(r"missing\+=\(([^)]*)\)", (ROOT / ".ci/run").read_text()):
        assert set(package.split()) <= set(line.split())


# --- the tree


def phrase(module: Path) -> str:
    """The first line of a module's docstring."""
    docstring = ast.get_docstring(ast.parse(module.read_text()))
    assert docstring, f"{module.relative_to(ROOT)} has no docstring"
    return docstring.splitlines()[0].removesuffix(".")


def tree_lines(folder: Path, indent: str = "") -> Iterator[tuple[str, str]]:
    """(drawing, phrase) of everything in a package: modules first, then folders."""
    from tests.tracked_files import tracked_files  # here, so that this file can be run as a script, too

    files = tracked_files(f"{folder.relative_to(ROOT)}/*.py")
    modules = [path for path in files if path.parent == folder and path.name != "__init__.py"]
    packages = [path for path in files if path.parent.parent == folder and path.name == "__init__.py"]
    folders = [path.parent for path in packages if path.read_text()]
    for path in [*modules, *folders]:
        last = path == [*modules, *folders][-1]
        branch, below = ("└── ", "    ") if last else ("├── ", "│   ")
        if path in modules:
            yield f"{indent}{branch}{path.name}", phrase(path)
        else:
            yield f"{indent}{branch}{path.name}/", phrase(path / "__init__.py")
            yield from tree_lines(path, indent + below)


def tree() -> str:
    lines = [("savant_ray/", phrase(ROOT / "savant_ray/__init__.py")), *tree_lines(ROOT / "savant_ray")]
    width = max(len(drawing) for drawing, _ in lines)
    return "".join(f"{drawing:<{width}}  {text}\n" for drawing, text in lines)


def test_the_tree_is_the_packages_with_the_modules_own_phrases():
    found = TREE.search(README.read_text())
    assert found and found[2] == tree(), "python tests/test_readme.py writes the tree anew"


# --- the settings


def table() -> str:
    rows = [(f"`{row.name}`", f"`{shown(row.default)}`", row.meaning) for row in setting_rows()]
    lines = [("setting", "default", "meaning"), ("---", "---", "---"), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def shown(value: Any) -> str:
    return show(value).replace("\n", " ")


def test_the_table_of_settings_is_that_of_the_program():
    found = TABLE.search(README.read_text())
    assert found and found[2] == table(), "python tests/test_readme.py writes the table anew"


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    text = README.read_text()
    for pattern, content in ((TREE, tree), (TABLE, table)):
        text = pattern.sub(lambda found, content=content: found[1] + content() + found[3], text)
    README.write_text(text)
