"""The command line as it was given: paths from where it was typed, values by the type of the parameter."""

import shutil

import pytest

from helpers.config import ConfigError
from helpers.runner.plan import make_plan, parse_parameter, run_parser
from helpers.stage.manifest import stage_settings
from helpers.workspace.place import repo_root

TINY = repo_root() / "helpers" / "assets" / "tiny" / "llama"


def plan_of(*argv):
    return make_plan(run_parser().parse_args(argv), argv)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The folder where the command is given: a person's data and models, named without ./"""
    folder = tmp_path / "here"
    for name in ("sqa", "drop", "openai-community/gpt2"):
        (folder / name).mkdir(parents=True)
    (folder / "sqa" / "problems.json").write_text("{}")
    (folder / "checkpoint.pth").write_bytes(b"x")
    shutil.copytree(TINY, folder / "my_llama")
    shutil.copytree(TINY, folder / "tiny" / "llama")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("RUNS_ROOT", str(tmp_path / "runs"))
    return folder


@pytest.mark.parametrize(
    ("stage", "name", "text"),
    [
        ("05_adem_scienceqa", "data", "sqa"),
        ("05_adem_scienceqa", "data", "./sqa/../sqa"),
        ("05_adem_scienceqa", "adapters", "checkpoint.pth"),
        ("05_adem_scienceqa", "data", "not_there"),
        ("08_demo", "science", "sqa"),
        ("08_demo", "gallery", "sqa"),
        ("08_demo", "bundle", "sqa"),
        ("03_adapter_training", "bundle", "sqa"),
        ("01_data_sharding", "gifs", "sqa"),
        ("01_data_sharding", "qa", "sqa/problems.json"),
    ],
)
def test_paths_are_relative_to_where_the_command_was_given(here, stage, name, text):
    plan = plan_of("--only", stage, "-p", name, text)
    assert plan.parameters[stage][name] == str(here / text.removeprefix("./sqa/../"))


def test_a_home_and_a_link_stay_what_a_person_means(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    (here / "link").symlink_to("sqa")
    assert plan_of("--only", "05", "-p", "data", "~/sqa").parameters["05_adem_scienceqa"]["data"] == str(here / "sqa")
    assert plan_of("--only", "05", "-p", "data", "link").parameters["05_adem_scienceqa"]["data"] == str(here / "link")


@pytest.mark.parametrize(
    ("name", "text"), [("ablation", "drop"), ("data", ""), ("data", "/kaggle/input/scienceqa"), ("data", "s3://a/b")]
)
def test_what_is_no_path_here_stays_as_it_is(here, name, text):
    assert plan_of("--only", "05", "-p", name, text).parameters["05_adem_scienceqa"][name] == text


def test_the_same_folder_has_the_same_settings_however_it_is_named(here):
    def settings(text):
        plan = plan_of("--only", "05", "-p", "data", text)
        spec = plan.specs[0]
        return stage_settings(spec, plan.profile, plan.parameters[spec.name], plan.folder)

    assert settings("sqa") == settings("./sqa") == settings(str(here / "sqa"))
    assert settings("sqa")["parameters"]["data"].startswith("content ")


@pytest.mark.parametrize("key", ["language_model.model", "encoder.model", "adem.language_model", "adem.vision_model"])
@pytest.mark.parametrize(
    ("text", "absolute"),
    [
        ("my_llama", "my_llama"),
        ("./my_llama", "my_llama"),
        ("~/my_llama", "my_llama"),
        ("./tiny/llama", "tiny/llama"),
        ("tiny/llama", None),  # the shipped one
        ("openai-community/gpt2", None),  # a folder of that name, but no model is in it
        ("meta-llama/Llama-3.2-1B", None),
        ("gpt2", None),
    ],
)
def test_own_models_are_named_from_where_the_command_was_given(here, monkeypatch, key, text, absolute):
    monkeypatch.setenv("HOME", str(here))
    plan = plan_of("-p", key, text)
    section, name = key.split(".")
    expected = str(here / absolute) if absolute else text
    assert getattr(getattr(plan.profile, section), name) == expected == plan.overrides[key]


def test_a_model_that_a_profile_file_names_is_found_from_there_too(here):
    text = (repo_root() / "helpers" / "profiles" / "tiny.yaml").read_text()
    (here / "mine").mkdir()
    (here / "mine" / "own.yaml").write_text(text.replace("model: tiny/llama", "model: my_llama"))
    plan = plan_of("--profile", "mine/own.yaml")
    assert plan.profile_name == str(here / "mine" / "own.yaml")
    assert plan.overrides == {"language_model.model": str(here / "my_llama")}
    assert plan.profile.language_model.model == str(here / "my_llama")


@pytest.mark.parametrize(
    ("text", "default", "value"),
    [
        ("010", 3, 10),
        ("010", 0.5, 10.0),
        ("010", "", "010"),
        ("1:30", "", "1:30"),
        ("False", True, False),
        ("[010, 2]", [1], [10, 2]),
        ("[010, 1:30]", [], ["010", "1:30"]),
        ("[a, 1]", ["x", 2], ["a", "1"]),
        ("010", None, "010"),
        ("null", None, None),
        ('{"a": 8}', {}, {"a": 8}),
    ],
)
def test_the_default_of_a_parameter_is_its_type(text, default, value):
    found = parse_parameter("x", text, default)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "default"),
    [("1:30", 3), ("1_0", 3), ("1.0", 3), ("", 3), (".inf", 0.5), ("nan", 0.5), ("inf", 0.5), ("1:30", 0.5),
     ("yes", True), ("1", True), ("a", []), ("[1:30]", [1]), ("[]", {}), ("a: 1", {}), ("{", {})],
)  # fmt: skip
def test_what_is_no_value_of_a_parameters_type_is_refused(text, default):
    with pytest.raises(ConfigError, match="parameter x: "):
        parse_parameter("x", text, default)


def test_runs_whose_names_differ_by_letter_case_do_not_share_a_place(here, tmp_path):
    (tmp_path / "runs" / "Night").mkdir(parents=True)
    with pytest.raises(ConfigError, match="there is a run 'Night'"):
        plan_of("--only", "01", "--run", "night")
    assert plan_of("--only", "01", "--run", "Night").run == "Night"


def test_a_model_that_has_no_chat_template_is_refused_before_anything_starts(here, monkeypatch):
    """Shipped, a folder, or in the hub's cache; only where a stage asks the model, and only with the key."""
    monkeypatch.setattr("helpers.workspace.weights._hub_model", lambda *asked: str(here / "my_llama"))
    (here / "my_llama" / "chat_template.jinja").unlink()
    for name in ("tiny/science_llama", "my_llama", "some/model"):
        model = ("-p", "language_model.model", name, "-p", "language_model.chat")
        with pytest.raises(ConfigError, match=rf"{name} has no chat template.*-p language_model\.chat false"):
            plan_of(*model, "true")
        assert plan_of(*model, "true", "--only", "01", "--only", "05").profile.language_model.chat
        plan_of(*model, "false")
    (here / "my_llama" / "chat_template.jinja").write_text("{{ raise_exception('no chat') }}")
    with pytest.raises(ConfigError, match=r"the chat template of .*my_llama fails: TemplateError: no chat"):
        plan_of("-p", "language_model.model", "my_llama", "-p", "language_model.chat", "true")
    for damaged in ("{", '{"version": "1.0"}'):
        (here / "my_llama" / "tokenizer.json").write_text(damaged)
        with pytest.raises(ConfigError, match="my_llama: no tokenizer can be read"):
            plan_of("-p", "language_model.model", "my_llama", "-p", "language_model.chat", "true")


def test_a_model_that_is_not_here_is_looked_at_later_and_not_fetched(here, monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError

    only_here = []

    def snapshot_download(*args, local_files_only=False, **kwargs):
        only_here.append(local_files_only)
        raise LocalEntryNotFoundError("not in the cache")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert plan_of("--profile", "kaggle").profile.language_model.chat
    assert only_here == [True]
