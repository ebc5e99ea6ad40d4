"""All settings as a table for `--help` and the documentation."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from itertools import groupby

from savant_ray.settings.sources import Setting
from savant_ray.settings.yaml_text import show

OPTION_WIDTH = 34


def settings_table(settings: Sequence[Setting], sections: Mapping[str, str], width: int) -> str:
    """Grouped by section: option, meaning and default; `sections` maps a section's name to its meaning."""
    groups = groupby(settings, lambda setting: setting.name.partition(".")[0])
    return "\n\n".join(
        "\n".join([f"{section}: {sections[section]}", *(_row(setting, width) for setting in group)])
        for section, group in groups
    )


def _row(setting: Setting, width: int) -> str:
    option = f"  --{setting.name}".ljust(OPTION_WIDTH - 1)
    text = f"{setting.meaning} [{show(setting.default)}]"
    return textwrap.fill(
        text,
        max(width, OPTION_WIDTH + 20),
        initial_indent=f"{option} ",
        subsequent_indent=" " * OPTION_WIDTH,
        break_on_hyphens=False,
    )
