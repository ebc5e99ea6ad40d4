"""No setting holds a password: settings lie in the run folder and in checkpoints, and Ray's dashboard shows them."""

from __future__ import annotations

import re

_PASSWORD = re.compile(r"://[^/\s]*:[^/\s]*@")  # of `scheme://user:password@host`


def without_password(text: str) -> str:
    """The text itself.

    Raises:
        ValueError: it is an address with a password in it; the message does not repeat it.
    """
    if _PASSWORD.search(text):
        raise ValueError(
            "the address holds a password, which everybody would see who sees the run; give it by the environment: "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    return text
