"""Defines every setting once: type, default, names and help. `assembly.py` builds the parts from the settings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from sidecar.settings import values

PREFIX = "SIDECAR_"

#: Environment variables of other programs with the same meaning. SIDECAR_… variables have precedence.
FOREIGN_NAMES: dict[str, str] = {
    "TRIO_REMOTE_VLM_URL": "dashscope_url",
    "TRIO_REMOTE_VLM_API_KEY": "dashscope_api_key",
    "TRIO_REMOTE_VLM_MODEL": "dashscope_model",
    "TRIO_VLM_API_CONCURRENCY": "max_concurrency",
    "TRIO_API_KEY": "api_key",
    "TRIO_MODEL": "local_model",
    "TRIO_MAX_TOKENS": "default_max_tokens",
    "TRIO_TEMPERATURE": "default_temperature",
    "TRIO_TOP_P": "default_top_p",
    "DASHSCOPE_API_KEY": "dashscope_api_key",
}

#: The user name and password in a URL. An error, `check` and `repr` do not show them.
PASSWORD = re.compile(r"(?<=://)[^\s]*(?=@)|^(?!\w+://)[^\s/]*:[^\s]*(?=@)")
SECRETS = frozenset({"dashscope_api_key", "api_key"})

#: Settings whose feature does not exist yet, by field, and what this version does instead. If an operator sets such a
#: setting, the sidecar does not start, because the operator expects an effect.
NOT_YET: dict[str, str] = {
    "shared_url": "this version cannot share one account's quota between sidecars",
    "shared_url_file": "this version cannot share one account's quota between sidecars",
    "spill": "this version has a fixed rule: a later backend takes what the earlier ones cannot answer in time",
    "upstream": "this version has one upstream per backend; set SIDECAR_DASHSCOPE_URL and the others at the top level",
}


class Settings(BaseModel):
    """The settings. The first source that has a value wins: command line, environment, file, default.

    Durations are in seconds, sizes in bytes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    backend: values.TextOrNone = Field(
        None,
        description="dashscope, local or simulated, or several in order such as dashscope,local: later ones take over."
        " Default: dashscope when a URL or key is set, else simulated",
    )
    host: values.Text = Field("127.0.0.1", description="address of the data listener, which callers use")
    port: values.Port = Field(8100, description="port of the data listener (trio-core's); 0 takes a free one")
    unix_socket: values.File = Field(None, description="path of a unix socket that takes requests too")
    admin_host: values.Text = Field("0.0.0.0", description="address of the admin listener: probes and metrics")  # noqa: S104
    admin_port: values.Port = Field(9464, description="port of the admin listener; 0 takes a free one")
    allowed_hosts: values.HostNames = Field(
        "",
        description="names under which a browser may use the listeners, with commas between them, such as"
        " cams.example.com; addresses and local names may always be used",
    )
    dashscope_url: values.Url = Field(
        "https://dashscope.aliyuncs.com/compatible-mode/v1", description="base URL of any OpenAI-compatible server"
    )
    dashscope_native_url: values.UrlOrNone = Field(
        None, description="base URL of DashScope's own API. Default: derived, …/compatible-mode/v1 becomes …/api/v1"
    )
    dashscope_api_key: values.Key = Field(None, repr=False, description="the provider's key")
    dashscope_api_key_file: values.File = Field(
        None, description="file that holds the provider's key; read again when it changes"
    )
    dashscope_model: values.Text = Field("qwen-vl-plus", description="model for requests that name none")
    local_model: values.TextOrNone = Field(None, description="folder or name of a transformers vision-language model")
    local_device: values.Text = Field("auto", description="device of the local model: auto, cpu, cuda, cuda:1, …")
    local_max_batch: Annotated[int, BeforeValidator(values.whole(1, 256))] = Field(
        8, description="most requests in one local batch"
    )
    local_batch_wait: Annotated[float, BeforeValidator(values.duration(least=0, most=10))] = Field(
        0.005, description="seconds the local engine may wait for a batch to fill"
    )
    local_image_urls: values.TextOrNothing = Field(
        "",
        description="where the local backend may take images from beside data URLs: URLs with spaces between them,"
        " such as https://cameras.lan/ file:///frames/; what lies below one is allowed",
    )
    detector_model: values.File = Field(None, description="ONNX file for /api/inference/detect")
    max_concurrency: values.CountOrAuto = Field(
        None, description="attempts in flight of each model; auto learns it, a number pins it"
    )
    requests_per_minute: values.NumberOrAuto = Field(
        None, description="ceiling of each model's request rate; auto learns it"
    )
    tokens_per_minute: values.NumberOrAuto = Field(
        None, description="ceiling of each model's LLM token rate; auto learns it"
    )
    refusal_budget: Annotated[float, BeforeValidator(values.number(0, most=0.2, example="0.005"))] = Field(
        0.005, description="share of upstream calls that may be spent on probing the limit"
    )
    deadline: values.Duration = Field(
        60.0,
        description="seconds until the first content of a stream, or until the whole answer where it is not streamed;"
        " callers may ask for less",
    )
    stream_idle: values.Duration = Field(30.0, description="seconds without content that end a stream after its first")
    stream_max: values.Duration = Field(600.0, description="seconds a stream may take")
    drain_timeout: values.DurationOrZero = Field(25.0, description="seconds to finish what was accepted after SIGTERM")
    queue_size: values.Count = Field(2000, description="most requests that wait")
    queue_bytes: values.Bytes = Field(
        256 * 1024 * 1024,
        description="most bytes of bodies that wait or are being received; at the bound the sidecar stops reading"
        " sockets. The bodies in flight may use as many again",
    )
    max_body_bytes: values.Bytes = Field(14 * 1024 * 1024, description="largest request body in bytes")
    key_header: values.HeaderName = Field("X-Camera-Id", description="header that holds the fair-queue key")
    api_key: values.Key = Field(None, repr=False, description="bearer token that callers must send")
    default_max_tokens: values.Count = Field(
        512, description="max_tokens of a request to trio-core's API that gives none"
    )
    default_temperature: Annotated[float, BeforeValidator(values.number(least=0, example="0.7"))] = Field(
        0.0, description="temperature of a request to trio-core's API"
    )
    default_top_p: Annotated[float, BeforeValidator(values.number(0, most=1, example="0.9"))] = Field(
        1.0, description="top_p of a request to trio-core's API"
    )
    state_file: values.File = Field(None, description="file where the learned limits survive a restart")
    passthrough: values.Flag = Field(
        False, description="other /v1 and /api/v1 paths go to an HTTP upstream under the same admission"
    )
    access_log: values.Flag = Field(False, description="one log line a request, with its waits")
    log_format: values.LogFormat = Field(None, description="json or human. Default: human on a terminal, else json")
    log_level: values.LogLevel = Field("info", description="least severe line to log")

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        for name, value in super().__repr_args__():
            yield name, PASSWORD.sub("***", value) if isinstance(value, str) else value

    @property
    def quarter_of_queue_bytes(self) -> int:
        """The share for bodies that arrive (the others wait), and for the answers of bodies in flight.

        Without a share of its own, a queue that is full would let nothing arrive, and bodies in flight no answer.
        """
        return self.queue_bytes // 4

    @property
    def backend_names(self) -> list[str]:
        """Return the backends in order: those of the setting, or the one that follows from the other settings."""
        if self.backend is not None:
            return [name.strip() for name in self.backend.split(",")]
        provider_settings = {"dashscope_url", "dashscope_api_key", "dashscope_api_key_file"} & self.model_fields_set
        return ["dashscope" if provider_settings else "simulated"]
