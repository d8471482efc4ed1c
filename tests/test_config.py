"""Profiles: strict keys and types, YAML's number trap, nearest valid names."""

import re
from pathlib import Path

import pytest
import yaml

from helpers.config import (
    ADEM_PRESETS,
    PROFILES,
    ConfigError,
    load_profile,
    parse_override,
    profile_keys,
    profile_names,
)


@pytest.mark.parametrize("name", ["tiny", "kaggle", "colab", "datacenter"])
def test_shipped_profiles_load_and_every_key_is_explained(name):
    assert load_profile(name).name == name
    for line in (PROFILES / f"{name}.yaml").read_text().splitlines():
        if line.startswith("  ") and not line.strip().startswith("#"):
            assert "  # " in line, line


def test_profiles_hold_every_key_of_the_schema():
    for name in profile_names():
        values = yaml.safe_load((PROFILES / f"{name}.yaml").read_text())
        preset = yaml.safe_load((ADEM_PRESETS / f"{values['adem']['preset']}.yaml").read_text())
        values["adem"] = preset | values["adem"]
        keys = {f"{section}.{key}" for section, part in values.items() if isinstance(part, dict) for key in part}
        assert keys | {"name"} == set(profile_keys())


def test_presets_explain_every_key():
    for path in ADEM_PRESETS.glob("*.yaml"):
        lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
        assert all("  # " in line for line in lines)
        assert load_profile("tiny", {"adem.preset": path.stem}).adem.preset == path.stem


def test_a_profile_without_the_adem_section_takes_the_tiny_preset(tmp_path):
    path = tmp_path / "older.yaml"
    path.write_text((PROFILES / "tiny.yaml").read_text().partition("\nadem:")[0])
    assert load_profile(str(path)).adem == load_profile("tiny").adem


def test_a_profile_without_the_alignment_section_goes_without_the_stage(tmp_path):
    path = tmp_path / "older.yaml"
    head, _, rest = (PROFILES / "kaggle.yaml").read_text().partition("\nalignment:")
    path.write_text(head + "\n\ntraining:" + rest.partition("\n\ntraining:")[2])
    assert load_profile(str(path)).alignment.epochs == 0 and load_profile("kaggle").alignment.epochs == 1
    assert load_profile(str(path), {"alignment.epochs": 2}).alignment.epochs == 2


def test_unknown_profile_names_the_nearest():
    with pytest.raises(ConfigError, match=r"'kaggel'.*'kaggle'"):
        load_profile("kaggel")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"mine\.yaml does not exist"):
        load_profile(str(tmp_path / "mine.yaml"))


def test_unknown_key_in_a_file_names_the_nearest(tmp_path):
    text = (PROFILES / "tiny.yaml").read_text().replace("  epochs:", "  epoch:")
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"unknown key 'training.epoch'; did you mean 'training.epochs'\?") as error:
        load_profile(str(path))
    assert "'training.epochs' is missing" in str(error.value)


def test_unknown_section_in_a_file_is_named(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text((PROFILES / "tiny.yaml").read_text() + "\ntrainings: {}\n")
    with pytest.raises(ConfigError, match="unknown key 'trainings'; did you mean 'training'"):
        load_profile(str(path))


@pytest.mark.parametrize("text", ["[1, 2", "- a\n- b\n", ""])
def test_a_file_that_is_no_profile_is_refused(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"mine\.yaml"):
        load_profile(str(path))


def test_unknown_override_names_the_nearest():
    with pytest.raises(ConfigError, match=r"'training\.epcohs'; did you mean 'training\.epochs'"):
        load_profile("tiny", {"training.epcohs": 2})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("training.epochs", "many"),
        ("training.epochs", 0),
        ("training.seed", 1.5),
        ("training.seed", True),
        ("shapes.train", "200"),
        ("data.groups", []),
        ("data.groups", "1"),
        ("data.corpus", "shape"),
        ("connector.train_mit", "yes"),
        ("language_model.prompt", "Answer:"),
        ("encoder.frames_per_group", 8),
    ],
)
def test_ill_typed_values_are_refused_by_name(key, value):
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
        load_profile("tiny", {key: value})


def test_groups_that_are_not_cached_are_refused():
    with pytest.raises(ConfigError, match=r"ask for \[4\].*data\.groups \[1, 2, 3\]"):
        load_profile("tiny", {"evaluation.groups": 4})


def test_number_without_a_dot_is_a_number_in_a_file(tmp_path):
    assert yaml.safe_load("1e-4") == "1e-4"  # the trap: YAML 1.1 reads this as text
    path = tmp_path / "mine.yaml"
    path.write_text(re.sub(r"learning_rate_mit: \S+", "learning_rate_mit: 1e-4", (PROFILES / "tiny.yaml").read_text()))
    assert load_profile(str(path)).training.learning_rate_mit == 1e-4


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("training.learning_rate_lora", "3e-4", 3e-4),
        ("training.epochs", "2", 2.0),
        ("data.groups", "[1, 2, 3]", [1, 2, 3]),
        ("encoder.revision", "007", "007"),
        ("encoder.revision", "null", None),
        ("language_model.model", "true", "true"),
        ("connector.train_mit", "false", False),
    ],
)
def test_command_line_text_becomes_the_type_of_the_key(key, text, value):
    section, name = key.split(".")
    profile = load_profile("tiny", {key: parse_override(key, text)})
    found = getattr(getattr(profile, section), name)
    assert found == value and type(found) is type(value)


def test_profile_cannot_be_changed_after_it_was_checked():
    profile = load_profile("tiny")
    with pytest.raises(ValueError, match="frozen"):
        profile.training.epochs = 3


REFUSED = object()
# What each type reads, and what it refuses. By the words of the schema alone: YAML 1.1 would read 010 as 8,
# 1:30 as 90, 1_0 as 10, 0x10 as 16, `yes` as true, `no` as false and .inf as infinity.
READINGS = [
    ("shapes.seed", "010", 10),
    ("shapes.seed", " 7 ", 7),
    ("shapes.seed", "+3", 3),
    *[("shapes.seed", text, REFUSED) for text in ("1:30", "0o10", "0x10", "1_0", "1.0", "1e3", "true", "", "٣")],
    ("training.epochs", "010", 10.0),
    ("training.epochs", ".5", 0.5),
    ("training.epochs", "1:30", REFUSED),
    ("training.learning_rate_lora", "1e-4", 1e-4),
    ("training.learning_rate_lora", "1E+2", 100.0),
    *[("adem.alpha", text, REFUSED) for text in (".inf", "-.inf", "inf", "nan", ".nan", "1e999", "1_0.0", "0x1p3", "")],
    ("connector.train_mit", "TRUE", True),
    *[("connector.train_mit", text, REFUSED) for text in ("yes", "on", "1", "null")],
    ("data.groups", "[010, 2]", [10, 2]),
    ("data.groups", " [ 1,2 ,3 ] ", [1, 2, 3]),
    *[("data.groups", text, REFUSED) for text in ("1", "1,2", "[1", "[1:30]", "[1.0]", '["1"]', "[1,,2]", "[[1]]")],
    ("adem.scales", "null", None),
    ("adem.scales", "[256, 64]", [256, 64]),
    ("language_model.target_modules", "[q_proj, no, 010, 1:30]", ["q_proj", "no", "010", "1:30"]),
    ("language_model.target_modules", '["a, b", "c\\"d", \'e f\']', ["a, b", 'c"d', "e f"]),
    ("adem.evaluation_splits", "[val, test]", ["val", "test"]),
    ("language_model.quantisation", "none", "none"),
    ("encoder.revision", "1e5", "1e5"),
    ("encoder.revision", "", None),
    ("language_model.prompt", "[{question}]", "[{question}]"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "text", "value"), READINGS)
def test_the_declared_type_alone_reads_the_command_line(key, text, value):
    if value is REFUSED:
        with pytest.raises(ConfigError, match=f"profile key {re.escape(key)}: cannot read .*: expected"):
            parse_override(key, text)
        return
    found = parse_override(key, text)
    assert found == value and type(found) is type(value)


def profile_with(path: Path, key: str, text: str) -> str:
    """Write the tiny profile with `text` as the value of `key`; returns the file's path."""
    section, name = key.split(".")
    head, start, rest = (PROFILES / "tiny.yaml").read_text().partition(f"\n{section}:\n")
    assert start
    line = re.compile(rf"^  {name}: .*$", re.MULTILINE)
    text = f"  {name}: {text}"
    rest = line.sub(lambda _: text, rest, count=1) if line.search(rest) else f"{text}\n{rest}"
    path.write_text(head + start + rest)
    return str(path)


# Brackets and braces are YAML's own; groups of ten no profile can cache.
OF_THE_COMMAND_LINE = {"[1", "[1,,2]", "[{question}]", "[010, 2]"}
# Written in a file only. Quotation marks make a text; `<<` takes over another mapping.
IN_A_FILE = [
    ("adem.scales", "[010, 64]", [10, 64]),
    ("adem.scales", "\n  - 010\n  - 64", [10, 64]),
    ("adem.scales", "[1:30]", REFUSED),
    ("adem.scales", "~", None),
    ("encoder.revision", "~", None),
    ("encoder.revision", "", None),
    ("encoder.revision", '"null"', "null"),
    ("encoder.revision", "2026-11-25", "2026-11-25"),
    ("encoder.revision", "no", "no"),
    ("encoder.revision", "0o17", "0o17"),
    ("language_model.model", "1.10", "1.10"),
    ("language_model.target_modules", "\n  - on\n  - 1_0\n  - '010'", ["on", "1_0", "010"]),
    ("adem.use_cls", "off", REFUSED),
    ("adem.use_cls", '"true"', REFUSED),
    ("training.seed", '"7"', REFUSED),
    ("training.seed", "[7]", REFUSED),
    ("training.seed", "{a: 7}", REFUSED),
    ("data.groups", "1", REFUSED),
    ("shapes.seed", "010  # ten", 10),
]


@pytest.mark.parametrize(
    ("key", "text", "value"), [case for case in READINGS if case[1] not in OF_THE_COMMAND_LINE] + IN_A_FILE
)
def test_a_value_in_a_file_means_what_it_means_on_the_command_line(tmp_path, key, text, value):
    file = profile_with(tmp_path / "mine.yaml", key, text)
    section, name = key.split(".")
    if value is REFUSED:
        with pytest.raises(ConfigError, match=re.escape(key)):
            load_profile(file)
        return
    found = getattr(getattr(load_profile(file), section), name)
    assert found == value and type(found) is type(value)


def test_a_mapping_may_take_over_another(tmp_path):
    lines = (PROFILES / "tiny.yaml").read_text().splitlines()
    rest = [line for line in lines if not line.startswith("  gpus:")]
    rest.insert(rest.index("encoder:") + 1, "  <<: {gpus: 02}")
    path = tmp_path / "mine.yaml"
    path.write_text("\n".join(rest))
    assert load_profile(str(path)).encoder.gpus == 2


@pytest.mark.parametrize("number", [".inf", "-.inf", ".nan", "1e999"])
def test_a_number_that_is_not_finite_is_refused_in_a_file_too(tmp_path, number):
    path = tmp_path / "mine.yaml"
    path.write_text(re.sub(r"weight_decay: \S+", f"weight_decay: {number}", (PROFILES / "tiny.yaml").read_text()))
    with pytest.raises(ConfigError, match=r"training\.weight_decay"):
        load_profile(str(path))


def test_a_profile_that_is_no_text_is_refused_in_words(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"name: caf\xe9\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml: not a text in UTF-8"):
        load_profile(str(path))


def test_a_key_that_went_is_accepted_in_a_profile_and_on_the_command_line(tmp_path):
    text = (PROFILES / "tiny.yaml").read_text().replace("\ndata:\n", "\ndata:\n  decode_seconds: 20.0\n")
    assert "decode_seconds" in text
    (tmp_path / "tiny.yaml").write_text(text)
    assert load_profile(str(tmp_path / "tiny.yaml")) == load_profile("tiny")
    assert load_profile("tiny", {"data.decode_seconds": parse_override("data.decode_seconds", "5")}) == load_profile(
        "tiny"
    )
