"""Test the sources of settings, their precedence, and that the README lists each setting with its default."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sidecar.settings import FOREIGN_NAMES, NOT_YET, Settings, SettingsError, load

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
