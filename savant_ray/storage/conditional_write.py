"""One small object that several processes write: read with its version, and replaced only if it is still that version.

`pyarrow.fs` has no conditional writes, `obstore` has: `If-None-Match: *` and `If-Match` of S3, generations of Google
Cloud Storage. The client is made from the options of the `pyarrow` file system, so that one URI configures both.
"""

from __future__ import annotations

import configparser
import os
import re
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow.fs as pafs

if TYPE_CHECKING:
    from obstore import UpdateVersion
    from obstore.store import GCSStore, S3Store

TIMEOUTS = {"timeout": "5s", "connect_timeout": "3s"}  # a renewal has to be through well within the silence of a lease
RETRIES = {"max_retries": 1, "retry_timeout": timedelta(seconds=5)}
NO_SUCH_VERSION = {"e_tag": '"0"', "version": "1"}
REFUSES_CONDITIONS = re.compile(r"status code: (400|405|501)\b|not (yet )?(implemented|supported)", re.IGNORECASE)


class Conflict(Exception):  # noqa: N818 - an expected outcome, not an error of the user's
    """The object is not the version that was read: another process has written it since."""


class NotConditional(OSError):  # noqa: N818
    """The storage, or the client's access to it, offers no conditional writes."""


class SharedObject(Protocol):
    """One object in a storage. Every method raises OSError if the storage is not reached or refuses."""

    def read(self) -> tuple[bytes, UpdateVersion | None]:
        """Return content and version; b"" and None if there is no object."""

    def write(self, content: bytes, version: UpdateVersion | None) -> UpdateVersion | None:
        """Write the object and return its new version. None as version: there is none yet.

        Raises:
            Conflict: it is not that version any more.
            NotConditional: the storage refuses the condition as such.
        """

    def is_conditional(self, content: bytes) -> bool:
        """Return whether the storage enforces the conditions; `content` is what was just written."""


class ConditionalObject:
    """An object in a storage that `obstore` has conditional writes for."""

    def __init__(self, store: S3Store | GCSStore, path: str) -> None:
        self._store, self._path = store, path

    def read(self) -> tuple[bytes, UpdateVersion | None]:
        """See `SharedObject`."""
        import obstore
        from obstore.exceptions import BaseError

        try:
            found = obstore.get(self._store, self._path)
            return bytes(found.bytes()), _version(found.meta)
        except FileNotFoundError:
            return b"", None
        except BaseError as error:
            raise OSError(_first_line(error)) from error

    def write(self, content: bytes, version: UpdateVersion | None) -> UpdateVersion | None:
        """See `SharedObject`."""
        import obstore
        from obstore.exceptions import AlreadyExistsError, BaseError, NotSupportedError, PreconditionError

        try:
            return _version(obstore.put(self._store, self._path, content, mode=version or "create"))
        except (AlreadyExistsError, PreconditionError) as error:
            raise Conflict from error
        except FileNotFoundError as error:  # no such bucket
            raise FileNotFoundError(_first_line(error)) from error
        except NotSupportedError as error:
            raise NotConditional(_first_line(error)) from error
        except BaseError as error:
            kind = NotConditional if REFUSES_CONDITIONS.search(str(error)) else OSError
            raise kind(_first_line(error)) from error

    def is_conditional(self, content: bytes) -> bool:
        """See `SharedObject`: whether both conditions fail that have to fail; a server may ignore their headers."""
        for version in (None, NO_SUCH_VERSION):
            try:
                self.write(content, version)  # type: ignore[arg-type]  # a plain dict
            except Conflict:
                continue
            except NotConditional:
                return False
            return False
        return True


class PlainObject:
    """An object in any storage that `pyarrow.fs` knows; the last writer wins."""

    def __init__(self, filesystem: pafs.FileSystem, path: str) -> None:
        self._filesystem, self._path = filesystem, path

    def read(self) -> tuple[bytes, UpdateVersion | None]:
        """See `SharedObject`."""
        try:
            with self._filesystem.open_input_stream(self._path) as file:
                return bytes(file.read()), None
        except FileNotFoundError:
            return b"", None

    def write(self, content: bytes, version: UpdateVersion | None) -> UpdateVersion | None:
        """See `SharedObject`."""
        with self._filesystem.open_output_stream(self._path) as file:
            file.write(content)
        return version

    def is_conditional(self, content: bytes) -> bool:
        """See `SharedObject`."""
        del content
        return False


def conditional_object(filesystem: pafs.FileSystem, path: str) -> ConditionalObject | None:
    """Return the object with conditional writes; None for a storage that has none here.

    Raises:
        OSError: `obstore` cannot be configured as the file system is.
    """
    bucket, _, key = path.partition("/")
    try:
        match filesystem.type_name:
            case "s3":
                return ConditionalObject(_s3(bucket, _options(filesystem)), key)
            case "gcs":
                return ConditionalObject(_gcs(bucket, _options(filesystem)), key)
            case _:
                return None
    except Exception as error:  # obstore raises errors of many types for a configuration that it does not take
        raise OSError(_first_line(error)) from error


def _options(filesystem: pafs.FileSystem) -> Mapping[str, Any]:
    """What the file system was made from, as it is sent to other processes."""
    _, arguments = filesystem.__reduce__()
    return dict(arguments[0])


def _s3(bucket: str, options: Mapping[str, Any]) -> S3Store:
    from obstore.store import S3Store

    _refuse(options, "role_arn", "tls_ca_file_path", "anonymous")
    if (options.get("proxy_options") or {}).get("host"):
        raise ValueError("a proxy is configured")
    names = {
        "region": "region",
        "access_key_id": "access_key",
        "secret_access_key": "secret_key",
        "token": "session_token",
    }
    config = {name: options[theirs] for name, theirs in names.items() if options.get(theirs)}
    if "access_key_id" not in config:
        config |= _profile(os.environ)
    config["virtual_hosted_style_request"] = "false"
    if endpoint := options.get("endpoint_override"):
        scheme, _, host = endpoint.rpartition("://")
        scheme = scheme or options.get("scheme") or "https"
        if options.get("force_virtual_addressing"):
            config["virtual_hosted_style_request"], host = "true", f"{bucket}.{host}"
        config["endpoint"] = f"{scheme}://{host}"
    client: Any = {**TIMEOUTS, "allow_http": True}
    return S3Store(bucket, config=config, client_options=client, retry_config=RETRIES)  # type: ignore[arg-type]


def _profile(environment: Mapping[str, str]) -> dict[str, str]:
    """The keys of the user's profile, as Amazon's own tools find them; `obstore` reads the environment only."""
    if environment.get("AWS_ACCESS_KEY_ID"):
        return {}
    path = environment.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials"
    parser = configparser.RawConfigParser()
    parser.read(Path(path).expanduser(), encoding="utf-8")
    profile = environment.get("AWS_PROFILE") or "default"
    found = dict(parser[profile]) if parser.has_section(profile) else {}
    names = {"access_key_id": "aws_access_key_id", "secret_access_key": "aws_secret_access_key"}
    names |= {"token": "aws_session_token"}
    return {name: found[theirs] for name, theirs in names.items() if found.get(theirs)}


def _gcs(bucket: str, options: Mapping[str, Any]) -> GCSStore:
    from obstore.store import GCSStore

    _refuse(options, "anonymous", "access_token", "target_service_account", "endpoint_override")
    client: Any = {**TIMEOUTS, "allow_http": True}
    return GCSStore(bucket, client_options=client, retry_config=RETRIES)  # type: ignore[arg-type]


def _refuse(options: Mapping[str, Any], *names: str) -> None:
    for name in names:
        if options.get(name):
            raise ValueError(f"{name} is set")


def _version(result: Any) -> UpdateVersion | None:
    """The parts of the version that the storage tells; obstore takes no None for one."""
    known = {name: result[name] for name in ("e_tag", "version") if result.get(name)}
    return known or None  # type: ignore[return-value]


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].strip()
