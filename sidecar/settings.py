"""Defines every setting once: type, default, names and help. `assembly.py` builds the parts from the settings."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from backends.registry import NAMES

PREFIX = "SIDECAR_"

#: Environment variables of other programs with the same meaning. SIDECAR_… variables have precedence.
FOREIGN_NAMES: dict[str, str] = {
    "TRIO_REMOTE_VLM_URL": "dashscope_url",
    "TRIO_REMOTE_VLM_API_KEY": "dashscope_api_key",
    "TRIO_REMOTE_VLM_MODEL": "dashscope_model",
    "TRIO_VLM_API_CONCURRENCY": "max_concurrency",
    "TRIO_API_KEY": "api_key",
    "TRIO_MODEL": "local_model",
    "DASHSCOPE_API_KEY": "dashscope_api_key",
}

SECRETS = frozenset({"dashscope_api_key", "api_key"})

#: Settings whose feature does not exist yet, by field, and what this version does instead. If an operator sets such a
#: setting, the sidecar does not start, because the operator expects an effect.
NOT_YET: dict[str, str] = {
    "shared_url": "this version cannot share one account's quota between sidecars",
    "shared_url_file": "this version cannot share one account's quota between sidecars",
    "spill": "this version has a fixed rule: a later backend takes what the earlier ones cannot answer in time",
    "upstream": "this version has one upstream per backend; set SIDECAR_DASHSCOPE_URL and the others at the top level",
}


def _auto(value: Any) -> Any:
    """Return None for `auto`, which means that the sidecar learns the value."""
    return None if isinstance(value, str) and value.strip().lower() == "auto" else value


def _key(value: str) -> str:
    """Remove the line break that `echo` and files add to a key.

    Raises `ValueError` if a header cannot carry the key.
    """
    key = value.strip()
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ValueError("must be one line of visible ASCII characters")
    return key


Key = Annotated[str, AfterValidator(_key)]
NumberOrAuto = Annotated[Annotated[float, Field(gt=0)] | None, BeforeValidator(_auto)]
CountOrAuto = Annotated[Annotated[int, Field(ge=1)] | None, BeforeValidator(_auto)]
Port = Annotated[int, Field(ge=0, le=65535)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class SettingsError(Exception):
    """A setting cannot be used. The message is one line that names the setting."""


class Settings(BaseModel):
    """The settings. The first source that has a value wins: command line, environment, file, default."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    backend: str | None = Field(
        None,
        description="dashscope, local or simulated, or several in order such as dashscope,local: later ones take over."
        " Default: dashscope when a URL or key is set, else simulated",
    )
    host: str = Field("127.0.0.1", description="address of the data listener, which callers use")
    port: Port = Field(8100, description="port of the data listener (trio-core's); 0 takes a free one")
    unix_socket: Path | None = Field(None, description="path of a unix socket that takes requests too")
    admin_host: str = Field("0.0.0.0", description="address of the admin listener: probes and metrics")  # noqa: S104
    admin_port: Port = Field(9464, description="port of the admin listener; 0 takes a free one")
    dashscope_url: str = Field(
        "https://dashscope.aliyuncs.com/compatible-mode/v1", description="base URL of any OpenAI-compatible server"
    )
    dashscope_native_url: str | None = Field(
        None, description="base URL of DashScope's own API. Default: derived, …/compatible-mode/v1 becomes …/api/v1"
    )
    dashscope_api_key: Key | None = Field(None, repr=False, description="the provider's key")
    dashscope_api_key_file: Path | None = Field(
        None, description="file that holds the provider's key; read again when it changes"
    )
    dashscope_model: str = Field("qwen-vl-plus", description="model for requests that name none")
    local_model: str | None = Field(None, description="folder or name of a transformers vision-language model")
    local_device: str = Field("auto", description="device of the local model: auto, cpu, cuda, cuda:1, …")
    local_max_batch: Annotated[int, Field(ge=1, le=256)] = Field(8, description="most requests in one local batch")
    local_batch_wait: Annotated[float, Field(ge=0, le=10)] = Field(
        0.005, description="seconds the local engine may wait for a batch to fill"
    )
    local_image_urls: str = Field(
        "",
        description="where the local backend may take images from beside data URLs: URLs with spaces between them,"
        " such as https://cameras.lan/ file:///frames/; what lies below one is allowed",
    )
    detector_model: Path | None = Field(None, description="ONNX file for /api/inference/detect")
    max_concurrency: CountOrAuto = Field(None, description="attempts in flight; auto learns it, a number pins it")
    requests_per_minute: NumberOrAuto = Field(None, description="ceiling of the request rate; auto learns it")
    tokens_per_minute: NumberOrAuto = Field(None, description="ceiling of the LLM token rate; auto learns it")
    refusal_budget: Annotated[float, Field(gt=0, le=0.2)] = Field(
        0.005, description="share of upstream calls that may be spent on probing the limit"
    )
    deadline: Seconds = Field(60.0, description="seconds a request may take; callers may ask for less")
    drain_timeout: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        25.0, description="seconds to finish what was accepted after SIGTERM"
    )
    queue_size: Annotated[int, Field(ge=1)] = Field(2000, description="most requests that wait")
    queue_bytes: Annotated[int, Field(ge=1)] = Field(
        256 * 1024 * 1024, description="most bytes that wait, those of bodies still being received among them"
    )
    max_body_bytes: Annotated[int, Field(ge=1)] = Field(14 * 1024 * 1024, description="largest request body in bytes")
    key_header: Annotated[str, Field(pattern=r"^[A-Za-z0-9-]+$")] = Field(
        "X-Camera-Id", description="header that holds the fair-queue key"
    )
    api_key: Key | None = Field(None, repr=False, description="bearer token that callers must send")
    state_file: Path | None = Field(None, description="file where the learned limits survive a restart")
    passthrough: bool = Field(False, description="other /v1 paths go to an HTTP upstream under the same admission")
    access_log: bool = Field(False, description="one log line a request, with its waits")
    log_format: Literal["json", "human"] | None = Field(
        None, description="json or human. Default: human on a terminal, else json"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severe line to log")

    @property
    def backend_names(self) -> list[str]:
        """Return the backends in order: those of the setting, or the one that follows from the other settings."""
        if self.backend is not None:
            return [name.strip() for name in self.backend.split(",")]
        provider_settings = {"dashscope_url", "dashscope_api_key", "dashscope_api_key_file"} & self.model_fields_set
        return ["dashscope" if provider_settings else "simulated"]


def load(
    options: Mapping[str, Any], environ: Mapping[str, str] = os.environ, file: Path | None = None
) -> tuple[Settings, dict[str, str]]:
    """Merge the sources. Return the settings, and for each field that was set the name of its source.

    Raises `SettingsError`.
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}

    def set_field(field: str, value: Any, origin: str) -> None:
        values[field] = value
        origins[field] = origin

    for field, value in (_read(file) if file is not None else {}).items():
        if field in NOT_YET:
            name = "[upstream.NAME]" if field == "upstream" else PREFIX + field.upper()
            raise SettingsError(f"{name} (from {file}): {NOT_YET[field]}")
        set_field(field, value, f"{file}")
    for field, why in NOT_YET.items():
        if environ.get(PREFIX + field.upper()):
            raise SettingsError(f"{PREFIX + field.upper()}: {why}")
    for name, field in FOREIGN_NAMES.items():
        if environ.get(name):
            set_field(field, environ[name], name)
    for field in Settings.model_fields:
        name = PREFIX + field.upper()
        if environ.get(name):
            set_field(field, environ[name], name)
    for field, value in options.items():
        set_field(field, value, option_name(field))
    try:
        settings = Settings(**values)
    except ValidationError as error:
        raise SettingsError(_one_line(error, origins)) from None
    _check(settings, origins)
    return settings, origins


def option_name(field: str) -> str:
    """Return the command-line option of a setting."""
    return "--" + field.replace("_", "-")


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--config {file}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"--config {file}: is not TOML: {error}") from None


def _one_line(error: ValidationError, origins: Mapping[str, str]) -> str:
    first = error.errors(include_url=False)[0]
    field = str(first["loc"][0]) if first["loc"] else ""
    where = origins.get(field, PREFIX + field.upper())
    if first["type"] == "extra_forbidden":
        return f"{where}: {field} is no setting; the README lists them all"
    shown = "" if field in SECRETS else f" (it is {str(first['input'])[:80]!r})"
    return f"{_named(field, where)}: {first['msg'].removeprefix('Value error, ')}{shown}"


def _named(field: str, where: str) -> str:
    name = PREFIX + field.upper()
    return name if where == name else f"{name} (from {where})"


def _check(settings: Settings, origins: Mapping[str, str]) -> None:
    """Check the conditions that involve several fields. Raises `SettingsError`."""

    def fail(field: str, why: str) -> None:
        raise SettingsError(f"{_named(field, origins.get(field, PREFIX + field.upper()))}: {why}")

    names = settings.backend_names
    if len(set(names)) < len(names):
        fail("backend", f"names a backend twice ({settings.backend!r})")
    for name in names:
        if name not in NAMES:
            fail("backend", f"there is no backend {name!r}; choose from {', '.join(NAMES)}")
    if not settings.dashscope_url.startswith(("http://", "https://")):
        fail("dashscope_url", f"must begin with http:// or https:// (it is {settings.dashscope_url[:80]!r})")
    if settings.dashscope_native_url and not settings.dashscope_native_url.startswith(("http://", "https://")):
        fail("dashscope_native_url", "must begin with http:// or https://")
    if "local" in names and not settings.local_model:
        fail("local_model", "the local backend needs the folder of a model")
