"""Commands on the pages exist, files and settings that they name exist, and generated parts are current."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from docs.generate import PART, PARTS, pages, regenerated

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
GENERATED = [page for page in pages() if PART.search(page.read_text(encoding="utf-8"))]
# The log describes the program as it was on each day.
PAGES = [page for page in [*pages(), ROOT / "CONTRIBUTING.md"] if page.name != "LOG.md"]
OTHER_PROGRAMS = set(
    "sudo git cd cp mv mkdir ls cat scp pip python3 source conda export chmod eval "
    "kubectl envsubst docker prometheus grafana tensorboard lm_eval curl".split()
)
FILES_OF_A_RUN = {"training_log.txt", "error_traceback.txt"}


def title(page: Path) -> str:
    return str(page.relative_to(ROOT))


each_page = pytest.mark.parametrize("page", PAGES, ids=title)


# --- commands on the pages


def blocks(page: Path, language: str) -> list[str]:
    found = re.findall(rf"^ *```{language}\n(.*?)^ *```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(block) for block in found]


def commands() -> Iterator[list[str]]:
    """Yield every command of every page as words; of a command with `--` both sides are commands."""
    for page in PAGES:
        for words in split_commands("".join(blocks(page, "sh")).replace("\\\n", " ")):
            if words[:1] == ["ray"] and "--" in words:
                separator = words.index("--")
                yield from (words[:separator], words[separator + 1 :])
            elif words:
                yield words


def split_commands(script: str) -> Iterator[list[str]]:
    """Yield the commands of a script, one per line, or over several lines within quotes."""
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


# --- commands, settings and targets that exist


@cache
def savant(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from savant_ray.cli import main; sys.exit(main())"
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)


@cache
def settings() -> frozenset[str]:
    """Return the dotted names that `savant config` prints."""
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


def unknown_to_ray(words: list[str]) -> set[str]:
    """Return which of these words, a command of Ray and its options, Ray does not have."""
    from ray.scripts.scripts import cli

    command: Any = cli
    while hasattr(command, "commands"):
        if words[0] not in command.commands:
            return {words[0]}
        command, *words = command.commands[words[0]], *words[1:]
    known = {name for parameter in command.params for name in parameter.opts}
    return {word for word in words if word.startswith("--")} - known


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
        assert unknown_to_ray(rest) == set(), words
    else:
        assert program in OTHER_PROGRAMS or (ROOT / rest[0]).is_file(), f"{words}: not a command that this test knows"


@pytest.mark.parametrize("words", list(commands()), ids=" ".join)
def test_every_command_on_a_page_exists_with_its_options(words):
    check(words)
    for name in words:
        if name.startswith(("configs/", "jobs/", "tests/", "savant_ray/")):
            assert (ROOT / name).is_file(), f"{name} does not exist"


@each_page
def test_files_that_a_page_names_exist(page):
    text = page.read_text(encoding="utf-8")
    named = re.findall(
        r"`((?:savant_ray|configs|jobs|tests|docs)/[\w./]*|\w+/[\w/]+\.py|[\w.]+\.(?:txt|toml|yml))`", text
    )
    folders = (ROOT, ROOT / "savant_ray", ROOT / "tests")
    missing = {name for name in named if not any((folder / name).exists() for folder in folders)}
    assert missing <= FILES_OF_A_RUN


@pytest.mark.parametrize("page", [README, ROOT / "CONTRIBUTING.md"], ids=title)
def test_links_on_pages_outside_of_the_site_exist(page):
    links = re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text(encoding="utf-8"))
    assert [path for path, _ in links if not (page.parent / path).exists()] == []
    for path, anchor in links:
        headings = (
            re.findall(r"^#+ (.*)$", (page.parent / path).read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
        )
        assert not anchor or anchor in {
            re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings
        }


@each_page
def test_settings_that_a_page_names_are_known(page):
    sections = {name.split(".")[0] for name in settings()}
    named = re.findall(r"`(?:--)?(\w+\.\w+)[ `:]", page.read_text(encoding="utf-8"))
    files = {"config.py", "data.py", "model.safetensors"}
    assert [n for n in named if n.split(".")[0] in sections and n not in settings() | files] == []


@each_page
def test_settings_in_yaml_and_environment_are_known(page):
    for block in blocks(page, "yaml"):
        for section, values in yaml.safe_load(block).items():
            assert [name for name in values if f"{section}.{name}" not in settings()] == []
    for section, name in re.findall(r"SAVANT_([A-Z]+)__([A-Z_]+)=", page.read_text(encoding="utf-8")):
        assert f"{section}.{name}".lower() in settings()


@each_page
def test_python_code_on_a_page_is_valid(page):
    for block in blocks(page, "python"):
        assert ast.parse(block).body


@each_page
def test_make_targets_that_a_page_names_exist(page):
    named = re.findall(r"`make ([a-z-]+)", page.read_text(encoding="utf-8"))
    assert [target for target in named if target not in make_targets()] == []


@pytest.mark.parametrize("page", [README, ROOT / "docs/getting_started.md"], ids=title)
def test_the_pages_name_the_apt_packages_that_ci_installs(page):
    line = next(line for line in page.read_text().splitlines() if line.startswith("sudo apt install"))
    for package in re.findall(r"missing\+=\(([^)]*)\)", (ROOT / ".ci/run").read_text()):
        assert set(package.split()) <= set(line.split())


@pytest.fixture
def slurm_job(tmp_path):
    """Return a function that starts the page's batch script for Slurm with a shell script in place of `savant`."""

    def start(run: str) -> subprocess.Popen[bytes]:
        for program, script in {"savant": run, "scontrol": "echo $* > scontrol.txt"}.items():
            (tmp_path / program).write_text(f"#!/bin/sh\n{script}\n")
            (tmp_path / program).chmod(0o755)
        (script,) = blocks(ROOT / "docs/guides/stop_and_resume.md", "bash")
        variables = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "12"}
        return subprocess.Popen(["bash", "-c", script], cwd=tmp_path, env=variables)

    return start


@pytest.mark.parametrize("code", [0, 3])
def test_the_batch_script_for_slurm_ends_with_the_exit_code_of_the_run(code, slurm_job, tmp_path):
    assert slurm_job(f"exit {code}").wait(20) == code
    assert not (tmp_path / "scontrol.txt").exists()


def test_the_batch_script_for_slurm_queues_the_job_again_after_a_stop(slurm_job, tmp_path):
    job = slurm_job("trap 'exit 75' TERM; touch begun; for _ in $(seq 200); do sleep 0.1; done")
    while not (tmp_path / "begun").exists():
        assert job.poll() is None
        time.sleep(0.05)
    job.terminate()
    job.wait(30)
    assert (tmp_path / "scontrol.txt").read_text() == "requeue 12\n"


def test_every_generated_part_is_on_one_page():
    placed = [name for page in GENERATED for _, name, *_ in PART.findall(page.read_text(encoding="utf-8"))]
    assert sorted(placed) == sorted(PARTS)


@pytest.mark.parametrize("page", GENERATED, ids=title)
def test_generated_parts_are_current(page):
    """Only words are compared: Python's versions break lines of `--help` differently."""
    text = page.read_text(encoding="utf-8")
    assert regenerated(text).split() == text.split(), f"{title(page)} is out of date; `make docs` generates it again"
