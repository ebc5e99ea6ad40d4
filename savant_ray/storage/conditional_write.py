"""Compare-and-swap of a small object in object storage: it is replaced only if it still has the version that was read.

`pyarrow.fs` has no conditional writes. `obstore` supports them, with `If-None-Match: *` and `If-Match` on S3 and with
generations on Google Cloud Storage. Its client gets the options of the pyarrow file system, so one URI configures both.
"""

from __future__ import annotations

import configparser
import os
import re
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import obstore
import pyarrow.fs as pafs
from obstore.exceptions import AlreadyExistsError, BaseError, NotSupportedError, PreconditionError
from obstore.store import GCSStore, S3Store

if TYPE_CHECKING:  # only defined for type checkers
    from obstore import UpdateVersion

TIMEOUTS = {"timeout": "5s", "connect_timeout": "3s"}  # a renewal has to finish well before the lease expires
RETRIES = {"max_retries": 1, "retry_timeout": timedelta(seconds=5)}
WRITE_SECONDS = 1.0  # an object that is empty for longer is not being written
NO_SUCH_VERSION = {"e_tag": '"0"', "version": "1"}
UNSUPPORTED = re.compile(r"status code: (400|405|501)\b|not (yet )?(implemented|supported)", re.IGNORECASE)


class VersionConflictError(Exception):
    """The object does not have the expected version: another process has written it."""


class ConditionsNotSupportedError(OSError):
    """The storage, or the client's access to it, does not support conditional writes."""


class SharedObject(Protocol):
    """One object in a storage. All methods raise OSError if the storage fails or cannot be reached."""

    def read(self) -> tuple[bytes, UpdateVersion | None]:
        """Return content and version; b"" and None if the object does not exist."""

    def write(self, content: bytes, version: UpdateVersion | None) -> UpdateVersion | None:
        """Write the object if it has `version` (None: if it does not exist) and return its new version.

        Raises:
            VersionConflictError: it has another version.
            ConditionsNotSupportedError: the storage does not support conditions.
        """


class ConditionalObject:
    """An object in a storage for which `obstore` has conditional writes."""

    def __init__(self, store: S3Store | GCSStore, path: str) -> None:
        self._store, self._path = store, path

    def read(self) -> tuple[bytes, UpdateVersion | None]:
        """See `SharedObject`."""
        try:
            result = obstore.get(self._store, self._path)
            return bytes(result.bytes()), _version(result.meta)
        except FileNotFoundError:
            return b"", None
        except BaseError as error:
            raise OSError(_first_line(error)) from error

    def write(self, content: bytes, version: UpdateVersion | None) -> UpdateVersion | None:
        """See `SharedObject`."""
        try:
            return _version(obstore.put(self._store, self._path, content, mode=version or "create"))
        except (AlreadyExistsError, PreconditionError) as error:
            raise VersionConflictError from error
        except FileNotFoundError as error:  # no such bucket
            raise FileNotFoundError(_first_line(error)) from error
        except NotSupportedError as error:
            raise ConditionsNotSupportedError(_first_line(error)) from error
        except BaseError as error:
            kind = ConditionsNotSupportedError if UNSUPPORTED.search(str(error)) else OSError
            raise kind(_first_line(error)) from error

    def is_conditional(self, content: bytes) -> bool:
        """Test whether the storage enforces conditions; `content` is the current content of the object.

        Attempts two writes whose conditions do not hold. A server that ignores the headers accepts them, and overwrites the
        object with `content`, which leaves it unchanged.
        """
        for version in (None, NO_SUCH_VERSION):
            try:
                self.write(content, version)  # type: ignore[arg-type]  # a plain dict
            except VersionConflictError:
                continue
            except ConditionsNotSupportedError:
                return False
            return False
        return True


class PlainObject:
    """An object in any storage that `pyarrow.fs` supports, without conditions: the last write wins."""

    def __init__(self, filesystem: pafs.FileSystem, path: str) -> None:
        self._filesystem, self._path = filesystem, path

    def read(self) -> tuple[bytes, UpdateVersion | None]:
        """See `SharedObject`.

        File systems such as HDFS show an object that is being written as empty. An empty object is therefore read again; if
        it stays empty for `WRITE_SECONDS`, its writer has died.
        """
        end = time.monotonic() + WRITE_SECONDS
        try:
            while True:
                with self._filesystem.open_input_stream(self._path) as file:
                    content = bytes(file.read())
                if content or time.monotonic() > end:
                    return content, None
                time.sleep(WRITE_SECONDS / 100)
        except FileNotFoundError:
            return b"", None

    def write(self, content: bytes, version: UpdateVersion | None) -> UpdateVersion | None:
        """Write the object; `version` is ignored."""
        with self._filesystem.open_output_stream(self._path) as file:
            file.write(content)
        return version


def conditional_object(filesystem: pafs.FileSystem, path: str) -> ConditionalObject | None:
    """Return the object with conditional writes; None if its storage is neither S3 nor Google Cloud Storage.

    Raises:
        OSError: the file system has an option that `obstore` does not support.
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
    except Exception as error:  # obstore raises errors of many types for an invalid configuration
        raise OSError(_first_line(error)) from error


def _options(filesystem: pafs.FileSystem) -> Mapping[str, Any]:
    """Return the file system's constructor arguments, which pyarrow exposes only through pickling."""
    _, arguments = filesystem.__reduce__()
    return dict(arguments[0])


def _s3(bucket: str, options: Mapping[str, Any]) -> S3Store:
    _raise_if_set(options, "role_arn", "tls_ca_file_path", "anonymous")
    if (options.get("proxy_options") or {}).get("host"):
        raise ValueError("a proxy is configured")
    names = {
        "region": "region",
        "access_key_id": "access_key",
        "secret_access_key": "secret_key",
        "token": "session_token",
    }
    config = {name: options[option] for name, option in names.items() if options.get(option)}
    if "access_key_id" not in config:
        config |= _profile_keys(os.environ)
    config["virtual_hosted_style_request"] = "false"
    if endpoint := options.get("endpoint_override"):
        scheme, _, host = endpoint.rpartition("://")
        scheme = scheme or options.get("scheme") or "https"
        if options.get("force_virtual_addressing"):
            config["virtual_hosted_style_request"], host = "true", f"{bucket}.{host}"
        config["endpoint"] = f"{scheme}://{host}"
    client: Any = {**TIMEOUTS, "allow_http": True}
    return S3Store(bucket, config=config, client_options=client, retry_config=RETRIES)  # type: ignore[arg-type]


def _profile_keys(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the access keys of the user's AWS profile; `obstore` reads environment variables only."""
    if environment.get("AWS_ACCESS_KEY_ID"):
        return {}
    path = environment.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials"
    parser = configparser.RawConfigParser()
    parser.read(Path(path).expanduser(), encoding="utf-8")
    profile = environment.get("AWS_PROFILE") or "default"
    keys = dict(parser[profile]) if parser.has_section(profile) else {}
    names = {
        "access_key_id": "aws_access_key_id",
        "secret_access_key": "aws_secret_access_key",
        "token": "aws_session_token",
    }
    return {name: keys[key] for name, key in names.items() if keys.get(key)}


def _gcs(bucket: str, options: Mapping[str, Any]) -> GCSStore:
    _raise_if_set(options, "anonymous", "access_token", "target_service_account", "endpoint_override")
    client: Any = {**TIMEOUTS, "allow_http": True}
    return GCSStore(bucket, client_options=client, retry_config=RETRIES)  # type: ignore[arg-type]


def _raise_if_set(options: Mapping[str, Any], *names: str) -> None:
    """Raise ValueError if one of these options is set."""
    for name in names:
        if options.get(name):
            raise ValueError(f"{name} is set")


def _version(result: Any) -> UpdateVersion | None:
    """Return the version without the parts that are None, which obstore does not accept."""
    version = {name: result[name] for name in ("e_tag", "version") if result.get(name)}
    return version or None  # type: ignore[return-value]


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].strip()
