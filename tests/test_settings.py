"""Test the sources of settings, their precedence, and that the README lists each setting with its default."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from sidecar.settings import (
    FOREIGN_NAMES,
    NOT_YET,
    Settings,
    SettingsError,
    load,
    missing_folder,
    notices,
    open_to_all,
    refuse_unintended_simulation,
)

README = Path(__file__).parent.parent / "README.md"
#: Settings that the contract has but that are refused until their feature works. The README leaves them out.
REFUSED_UNTIL_THEY_WORK = {f"SIDECAR_{name.upper()}" for name in NOT_YET}


def test_option_beats_environment_beats_file_beats_default(tmp_path):
    file = tmp_path / "sidecar.toml"
    file.write_text("port = 1\nadmin_port = 1\ndeadline = 1.0\n")
    environ = {"SIDECAR_PORT": "2", "SIDECAR_ADMIN_PORT": "2"}
    settings, origins = load({"port": "3"}, environ, file)
    assert (settings.port, settings.admin_port, settings.deadline, settings.queue_size) == (3, 2, 1.0, 2000)
    assert origins == {"port": "--port", "admin_port": "SIDECAR_ADMIN_PORT", "deadline": str(file)}


def test_our_variables_win_over_those_of_other_programs():
    assert load({}, {"DASHSCOPE_API_KEY": "a", "SIDECAR_DASHSCOPE_API_KEY": "b"})[0].dashscope_api_key == "b"


@pytest.mark.parametrize(
    ("environ", "backend"),
    [
        ({}, "simulated"),
        ({"DASHSCOPE_API_KEY": "k"}, "dashscope"),
        ({"TRIO_REMOTE_VLM_URL": "http://x"}, "dashscope"),
        ({"SIDECAR_DASHSCOPE_API_KEY_FILE": "f"}, "dashscope"),
        ({"SIDECAR_DASHSCOPE_MODEL": "m"}, "simulated"),
        ({"SIDECAR_BACKEND": "simulated", "DASHSCOPE_API_KEY": "k"}, "simulated"),
    ],
)
def test_the_other_settings_choose_the_default_backend(environ, backend):
    assert load({}, environ)[0].backend_names == [backend]


def test_auto_means_none_and_a_number_is_a_ceiling():
    settings, _ = load({}, {"SIDECAR_MAX_CONCURRENCY": "auto", "SIDECAR_REQUESTS_PER_MINUTE": "90"})
    assert (settings.max_concurrency, settings.requests_per_minute) == (None, 90.0)


def test_an_empty_variable_is_ignored():
    assert load({}, {"SIDECAR_PORT": "", "SIDECAR_BACKEND": ""})[0].port == 8100


def test_a_key_loses_its_line_break_and_an_invalid_key_is_refused_without_being_shown():
    assert load({}, {"SIDECAR_DASHSCOPE_API_KEY": "sk-1\n", "SIDECAR_API_KEY": " c "})[0].dashscope_api_key == "sk-1"
    for key in ("sk-1\r\nX-Evil: 1", "sk 1", "sk-\u2026"):
        with pytest.raises(SettingsError, match="SIDECAR_DASHSCOPE_API_KEY: must be one line of visible") as caught:
            load({}, {"SIDECAR_DASHSCOPE_API_KEY": key})
        assert "sk" not in str(caught.value)


def test_an_error_names_setting_value_and_source():
    with pytest.raises(SettingsError, match=r"SIDECAR_PORT \(from --port\): .*'x'"):
        load({"port": "x"}, {})


@pytest.mark.parametrize("name", ["SIDECAR_SHARED_URL", "SIDECAR_SHARED_URL_FILE", "SIDECAR_SPILL"])
def test_a_setting_without_its_feature_is_refused_by_name_and_its_value_is_not_shown(name, tmp_path):
    with pytest.raises(SettingsError, match=f"{name}: this version") as caught:
        load({}, {name: "redis://me:secret@host"})
    file = tmp_path / "sidecar.toml"
    file.write_text(f'{name.removeprefix("SIDECAR_").lower()} = "redis://me:secret@host"\n')
    with pytest.raises(SettingsError, match=rf"{name} \(from .*sidecar\.toml\): this version") as caught_in_file:
        load({}, {}, file)
    assert "secret" not in f"{caught.value} {caught_in_file.value}"
    assert load({}, {name: ""})[0] == load({}, {})[0]
    assert name not in README.read_text()


def test_tables_of_upstreams_are_refused_by_name(tmp_path):
    file = tmp_path / "sidecar.toml"
    file.write_text('[upstream.first]\nurl = "http://x"\n')
    with pytest.raises(SettingsError, match=r"\[upstream\.NAME\] \(from .*sidecar\.toml\): this version"):
        load({}, {}, file)


def test_the_readme_lists_every_setting_with_its_default():
    rows = dict(re.findall(r"^\| `(SIDECAR_\w+)` \| (.*?) \|", README.read_text(), re.MULTILINE))
    defaults = {f"SIDECAR_{name.upper()}": field.default for name, field in Settings.model_fields.items()}
    assert rows.keys() == defaults.keys() - REFUSED_UNTIL_THEY_WORK
    for name, default in ((name, defaults[name]) for name in rows):
        shown = rows[name].strip("`")
        if default is None:
            assert shown in ("", "auto", "derived", "by terminal", "by the other settings"), name
        else:
            assert shown == str(default), name
    for name in FOREIGN_NAMES:
        assert f"`{name}`" in README.read_text()


def test_no_key_is_in_the_text_of_the_settings():
    settings, _ = load({}, {"SIDECAR_DASHSCOPE_API_KEY": "sk-secret-one", "SIDECAR_API_KEY": "secret-two"}, None)
    assert "secret" not in f"{settings!r} {settings}"


# -- values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("deadline", "45s", 45.0),
        ("deadline", "1.5m", 90.0),
        ("deadline", "750 ms", 0.75),
        ("deadline", "12", 12.0),
        ("drain_timeout", "0", 0.0),
        ("local_batch_wait", "20ms", 0.02),
        ("max_body_bytes", "9MiB", 9 * 1024 * 1024),
        ("max_body_bytes", "9MB", 9_000_000),
        ("queue_bytes", "1.5GiB", 3 * 512 * 1024 * 1024),
        ("queue_bytes", "300Mi", 300 * 1024 * 1024),
        ("log_level", "WARNING", "warning"),
        ("log_format", "Human", "human"),
        ("passthrough", "Yes", True),
        ("passthrough", "off", False),
    ],
)
def test_a_value_may_have_a_unit_and_words_any_case(field, text, value):
    assert getattr(load({}, {f"SIDECAR_{field.upper()}": text})[0], field) == value


def test_units_work_in_a_file_too(tmp_path):
    file = tmp_path / "sidecar.toml"
    file.write_text('deadline = "2m"\nqueue_bytes = "5MB"\ndrain_timeout = 7\n')
    settings, _ = load({}, {}, file)
    assert (settings.deadline, settings.queue_bytes, settings.drain_timeout) == (120.0, 5_000_000, 7.0)


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("DEADLINE", "30 parsecs", "such as 30s, 1m or 500ms"),
        ("DEADLINE", "0s", "above 0"),
        ("DEADLINE", "inf", "above 0"),
        ("LOCAL_BATCH_WAIT", "11s", "at most 10 s"),
        ("MAX_BODY_BYTES", "14 tons", "such as 14MiB or 14MB"),
        ("QUEUE_BYTES", "0", "at least 1 byte"),
        ("PORT", "65536", "from 0 to 65535"),
        ("QUEUE_SIZE", "2.5", "whole number of at least 1"),
        ("LOCAL_MAX_BATCH", "257", "from 1 to 256"),
        ("MAX_CONCURRENCY", "few", "or auto"),
        ("TOKENS_PER_MINUTE", "-3", "above 0, or auto"),
        ("REFUSAL_BUDGET", "0.3", "at most 0.2"),
        ("LOG_LEVEL", "chatty", "one of debug, info, warning, error"),
        ("ACCESS_LOG", "maybe", "true or false"),
        ("KEY_HEADER", "X Camera", "name of a header"),
        ("DASHSCOPE_URL", "provider.example/v1", "begins with http:// or https://"),
        ("DASHSCOPE_URL", "http://provider.example:eighty/v1", "begins with http:// or https://"),
        ("DASHSCOPE_URL", "http://provider.example/v1?key=1", "without a query"),
        ("BACKEND", ",", "choose from"),
        ("BACKEND", "dashscope,", "a comma without a name"),
        ("STATE_FILE", "/dev/null", "is not a regular file"),
    ],
)
def test_an_error_is_one_plain_line_with_setting_value_and_remedy(name, value, remedy):
    with pytest.raises(SettingsError) as caught:
        load({}, {f"SIDECAR_{name}": value})
    line = str(caught.value)
    assert line.startswith(f"SIDECAR_{name}: ")
    assert remedy in line
    assert value[:10] in line
    for phrase in ("PosixPath", "Input should", "validation", "pydantic", "Value error", "\n"):
        assert phrase not in line


def test_a_password_in_a_url_is_not_shown():
    with pytest.raises(SettingsError) as caught:
        load({}, {"SIDECAR_DASHSCOPE_URL": "http://me:hunter2@host:no-port/v1"})
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("name", ["SIDECAR_API_KEY", "SIDECAR_DASHSCOPE_API_KEY", "SIDECAR_DASHSCOPE_API_KEY_FILE"])
@pytest.mark.parametrize("blank", ["", " ", "\n"])
def test_a_blank_secret_of_our_own_is_an_error_and_never_no_secret(name, blank, tmp_path):
    with pytest.raises(SettingsError, match=f"^{name}: is empty"):
        load({}, {name: blank, "TRIO_API_KEY": "letmein"})
    if name != "SIDECAR_DASHSCOPE_API_KEY_FILE":
        file = tmp_path / "sidecar.toml"
        file.write_text(f"{name.removeprefix('SIDECAR_').lower()} = {json.dumps(blank)}\n")
        with pytest.raises(SettingsError, match=f"^{name} .from .*: is empty"):
            load({}, {}, file)


def test_a_blank_secret_of_another_program_counts_as_absent():
    settings, origins = load({}, {"TRIO_API_KEY": "", "DASHSCOPE_API_KEY": "  ", "TRIO_REMOTE_VLM_API_KEY": "sk-1"})
    assert (settings.api_key, settings.dashscope_api_key) == (None, "sk-1")
    assert origins == {"dashscope_api_key": "TRIO_REMOTE_VLM_API_KEY"}


def test_trio_cores_names_are_read_in_any_case_and_its_sampling_too():
    settings, _ = load({}, {"trio_max_tokens": "77", "Trio_Temperature": "0.4", "TRIO_TOP_P": "0.8"})
    assert (settings.default_max_tokens, settings.default_temperature, settings.default_top_p) == (77, 0.4, 0.8)


def test_a_state_file_in_a_folder_that_does_not_exist_is_named_with_the_remedy(tmp_path):
    assert missing_folder(*load({}, {"SIDECAR_STATE_FILE": str(tmp_path / "state.json")})) is None
    assert missing_folder(*load({}, {})) is None
    file = tmp_path / "no-such-folder" / "state.json"
    line = missing_folder(*load({}, {"SIDECAR_STATE_FILE": str(file)}))
    assert line is not None
    assert line.startswith(f"SIDECAR_STATE_FILE={file}: the folder '{file.parent}' does not exist; create it")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "[::]", "10.0.0.7", "gate.example.com", "localhost.example.com"])
def test_a_listener_that_other_machines_can_reach_without_a_key_causes_a_warning(host):
    line = open_to_all(*load({}, {"SIDECAR_HOST": host}))
    assert line is not None
    assert line.startswith(f"SIDECAR_HOST={host}: other machines may reach the data listener, and callers need no key")
    assert open_to_all(*load({}, {"SIDECAR_HOST": host, "SIDECAR_API_KEY": "letmein"})) is None


@pytest.mark.parametrize("host", [None, "127.0.0.1", "127.8.0.1", "::1", "[::1]", "localhost", "Localhost."])
def test_a_listener_on_loopback_causes_no_warning(host):
    assert open_to_all(*load({}, {} if host is None else {"SIDECAR_HOST": host})) is None


# -- names without effect ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("SIDECAR_DASHSCOPE_APIKEY", "SIDECAR_DASHSCOPE_API_KEY"),
        ("SIDECAR_APIKEY", "SIDECAR_API_KEY"),
        ("SIDECAR_DEAD_LINE", "SIDECAR_DEADLINE"),
        ("sidecar_queue_size", "SIDECAR_QUEUE_SIZE"),
    ],
)
def test_an_unknown_name_is_named_with_the_nearest_known_one(name, nearest, tmp_path):
    [line] = notices({name: "the-value"}, tmp_path)
    assert f"{name} is no setting" in line
    assert f"{nearest} is one" in line
    assert "the-value" not in line


def test_names_that_kubernetes_creates_for_a_service_are_ignored(tmp_path):
    environ = {
        "SIDECAR_SERVICE_HOST": "10.0.0.7",
        "SIDECAR_SERVICE_PORT": "8100",
        "SIDECAR_SERVICE_PORT_METRICS": "9464",
        "SIDECAR_PORT": "tcp://10.0.0.7:8100",
        "SIDECAR_PORT_8100_TCP": "tcp://10.0.0.7:8100",
        "SIDECAR_PORT_8100_TCP_PROTO": "tcp",
        "SIDECAR_PORT_8100_TCP_ADDR": "10.0.0.7",
        "SIDECAR_ADMIN_SERVICE_HOST": "10.0.0.8",
        "SIDECAR_REDIS_PORT": "tcp://10.0.0.9:6379",
        "TRIO_CORE_PORT": "tcp://10.0.0.9:8100",
        "TRIO_CORE_SERVICE_HOST": "10.0.0.9",
    }
    assert load({}, environ)[0] == load({}, {})[0]
    assert list(notices(environ, tmp_path)) == [
        "SIDECAR_PORT=tcp://… is ignored: Kubernetes creates it for a service of that name"
    ]


def test_each_name_of_trio_core_that_has_no_effect_is_named(tmp_path):
    [line] = notices({"TRIO_MAX_TOKENS": "5", "TRIO_HOST": "::", "trio_cache_dir": "/c", "TRIO_EMPTY": ""}, tmp_path)
    assert "TRIO_HOST, trio_cache_dir" in line
    assert "TRIO_MAX_TOKENS" not in line


def test_a_dotenv_file_that_names_a_real_backend_stops_the_start_instead_of_made_up_answers(tmp_path):
    (tmp_path / ".env").write_text(
        "# the provider\nexport trio_remote_vlm_url = 'http://p/v1'\nTRIO_REMOTE_VLM_API_KEY=sk-7\nTRIO_MODEL=\nA=b\n"
    )

    def refuse(**environ):
        refuse_unintended_simulation(*load({}, environ), environ, tmp_path)

    with pytest.raises(
        SettingsError, match=r"\.env .* sets TRIO_REMOTE_VLM_API_KEY, TRIO_REMOTE_VLM_URL, but"
    ) as caught:
        refuse()
    assert "sk-7" not in str(caught.value)
    refuse(SIDECAR_BACKEND="simulated")
    refuse(TRIO_REMOTE_VLM_URL="http://p/v1")
    [line] = notices({"TRIO_REMOTE_VLM_URL": "http://p/v1"}, tmp_path)
    assert "does not read .env" in line
    assert "TRIO_REMOTE_VLM_API_KEY" in line


@pytest.mark.parametrize("name", ["TRIO_MODEL", "SIDECAR_DASHSCOPE_MODEL", "SIDECAR_DASHSCOPE_NATIVE_URL"])
def test_a_setting_that_only_a_real_backend_uses_stops_the_start(name, tmp_path):
    environ = {name: "http://p/api/v1"}
    with pytest.raises(SettingsError, match=f"{name}.* is set, but no backend would use it"):
        refuse_unintended_simulation(*load({}, environ), environ, tmp_path)


def test_a_file_with_settings_must_be_a_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SettingsError, match="pipe: cannot be read: it must be a regular file"):
        load({}, {}, tmp_path / "pipe")


@pytest.mark.parametrize(
    ("name", "value"),
    [("STATE_FILE", "a" * 300), ("DEADLINE", "1" + "0" * 400), ("DASHSCOPE_URL", "name:s3cret@host/v1")],
)
def test_an_impossible_value_is_one_line_and_shows_no_password(name, value):
    with pytest.raises(SettingsError) as failed:
        load({}, {f"SIDECAR_{name}": value})
    assert str(failed.value).startswith(f"SIDECAR_{name}")
    assert "\n" not in str(failed.value)
    assert "s3cret" not in str(failed.value)
