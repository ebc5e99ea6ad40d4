"""Variables of the environment: which are settings, which are misspelt ones, and which are somebody else's."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping

from savant_ray.settings.complaints import did_you_mean
from savant_ray.settings.yaml_text import YamlProblems, load_yaml

PREFIX = "SAVANT_"

# Kubernetes adds these to every pod for each service of its namespace, and Docker for each linked container:
# https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables
_SERVICE = re.compile(
    r"\w+_SERVICE_HOST|\w+_SERVICE_PORT(_\w+)?|\w+_PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?|\w+_ENV_\w+"
)
_SERVICE_WITH_VALUE = re.compile(r"\w+_PORT=(tcp|udp|sctp)://.*|\w+_NAME=/[^/]+/[^/]+", re.DOTALL)


def is_of_a_service(variable: str, value: str) -> bool:
    """Whether Kubernetes or Docker set a variable for a service whose name begins as our settings do."""
    return bool(_SERVICE.fullmatch(variable) or _SERVICE_WITH_VALUE.fullmatch(f"{variable}={value}"))


def misspelt_variable(variable: str, known: Iterable[str]) -> str | None:
    """Return `; did you mean …?`, or nothing if no setting is close; None if the variable is not meant as a setting.

    A variable is meant as a setting if it reads SAVANT_SECTION__NAME, or is nearly a setting's name, with or without
    the section. `known` are the variables of all settings.
    """
    known = list(known)
    plain = _plain(variable)
    section = next((s for s in {_section(name) for name in known} if plain.startswith(f"{s}_")), None)
    if section is not None:
        fields = {_field(name): name for name in known if _section(name) == section}
        meant = _nearest(plain.removeprefix(f"{section}_"), fields, 0.8)
    else:
        meant = _nearest(plain, {_plain(name): name for name in known}, 0.85)
        meant = meant or _nearest(plain, {_field(name): name for name in reversed(known)}, 0.9)
    if meant is not None:
        return f"; did you mean {meant}?"
    return did_you_mean(variable, known) if re.search(r"__|\.", variable) else None


def _nearest(word: str, names: Mapping[str, str], cutoff: float) -> str | None:
    close = difflib.get_close_matches(word, names, n=1, cutoff=cutoff)
    return names[close[0]] if close else None


def _section(variable: str) -> str:
    return _plain(variable.partition("__")[0])


def _field(variable: str) -> str:
    return _plain(variable.partition("__")[2])


def _plain(variable: str) -> str:
    """The words of a variable, whatever separates them."""
    return re.sub(r"[\W_]+", "_", variable.upper().removeprefix(PREFIX)).strip("_")


def unquoted(text: str) -> str:
    """A value without the quotes around the whole of it, read as YAML reads them, and without a Windows line end."""
    text = text.removesuffix("\r")
    stripped = text.strip()
    if len(stripped) < 2 or stripped[0] not in "'\"" or stripped[-1] != stripped[0]:
        return text
    inner = stripped[1:-1]
    try:
        value = load_yaml(stripped)
    except YamlProblems:  # two quoted words, or a backslash that is no escape
        return text if stripped[0] in inner else inner
    return value if isinstance(value, str) else text
