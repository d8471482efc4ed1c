"""Profiles: every size and choice of a run, in YAML, checked against a strict schema before anything starts."""

import difflib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from helpers.workspace.place import default_profile

PROFILES = Path(__file__).resolve().parent / "profiles"
ADEM_PRESETS = PROFILES / "adem"
SECTIONS = (
    *("data", "shapes", "encoder", "language_model", "connector", "alignment", "training", "evaluation", "adem"),
    "retrieval",
)


# By section, the keys that change how fast or how safely a run goes, not what it makes (GPUs: up to rounding and the
# random numbers of dropout). Whoever compares settings leaves them out on both sides.
PACING: dict[str, frozenset[str]] = {
    "data": frozenset({"workers"}),
    "encoder": frozenset({"batch_groups", "gpus"}),
    "training": frozenset({"checkpoint_minutes", "log_steps", "gradient_checkpointing", "gpus"}),
    "evaluation": frozenset({"batch_tokens"}),
    "adem": frozenset({"preset", "checkpoint_minutes", "log_steps", "gradient_checkpointing", "evaluation_batch"}),
    "retrieval": frozenset({"checkpoint_minutes", "log_steps"}),
}
# By section, lists of which only the members decide: neither their order nor a repetition.
MEMBERS: dict[str, frozenset[str]] = {"data": frozenset({"groups"}), "language_model": frozenset({"target_modules"})}
# By section, the key that turns all of it off at 0: then no other key of it decides anything.
SWITCHES: dict[str, str] = {"alignment": "epochs"}
# By section, the keys that earlier versions had: runs, checkpoints and bundles of then still name them.
REMOVED: dict[str, frozenset[str]] = {"data": frozenset({"decode_seconds"})}


# Of ADEM-VL. Module, where the query is taken, where the result is added: "mlp_in_out" asks with the (normalised) input
# of a block's MLP and adds to its output; mhsa is the self-attention.
PLACEMENTS = ("mlp_in_out", "mlp_in_in", "mlp_out_out", "mhsa_in_out", "mhsa_in_in", "mhsa_out_out")
PHI_NAMES = ("silu", "identity", "relu", "elu", "softmax", "silu_positive")  # functions of its scores


class ConfigError(ValueError):
    """A profile, a profile key or a value that cannot be used; the message names it and the way out."""


INTEGER = re.compile(r"[-+]?[0-9]+")
NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")


def _number(value: Any) -> Any:
    """YAML 1.1 reads `1e-4` (no dot) as text: take text that is a plain number as the number it means."""
    if isinstance(value, str) and NUMBER.fullmatch(value.strip()):
        return float(value)
    return value


@dataclass(frozen=True)
class Key:
    """What a profile key declares of itself. before: what the suite did when the key did not exist."""

    before: Any


Float = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Positive = Annotated[int, Field(ge=1)]
Groups = Annotated[list[Annotated[int, Field(ge=1, le=8)]], Field(min_length=1)]


class Section(BaseModel):
    """A part of a profile: unknown keys are refused and values never change once checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class DataConfig(Section):
    """Which corpus, and how its GIFs are decoded and stored."""

    corpus: Literal["shapes", "tgif_qa", "own_gifs"]
    shard_size: Positive
    image_size: Annotated[int, Field(ge=16)]
    frame_format: Literal["png", "webp"]
    frame_quality: Annotated[int, Field(ge=1, le=100)]
    groups: Groups
    max_canvas_pixels: Positive
    max_frames: Positive
    max_bytes: Positive
    workers: Positive


class ShapesConfig(Section):
    """The built-in world: its seed and its number of GIFs."""

    seed: Annotated[int, Field(ge=0)]
    train: Positive
    test: Positive


class EncoderConfig(Section):
    """The frozen video encoder and the frames that it sees at once."""

    model: str
    revision: str | None
    frames_per_group: Positive
    batch_groups: Positive
    gpus: Annotated[Positive, Key(before=1)] = 1


class LanguageModelConfig(Section):
    """The frozen language model and the adapter that is trained inside it."""

    model: str
    revision: str | None
    prompt: str
    quantisation: Literal["nf4", "none"]
    adapter: Literal["lora", "ia3"]
    lora_rank: Positive
    lora_alpha: Positive
    lora_dropout: Annotated[Float, Field(ge=0, lt=1)]
    target_modules: Annotated[list[str], Field(min_length=1)]
    chat: Annotated[bool, Key(before=False)] = False
    option_style: Annotated[Literal["lettered", "listed"], Key(before="listed")] = "listed"

    @model_validator(mode="after")
    def _prompt_has_a_question(self) -> "LanguageModelConfig":
        if "{question}" not in self.prompt:
            raise ValueError("language_model.prompt must contain {question}")
        return self


class ConnectorConfig(Section):
    """What turns video embeddings into tokens of the language model."""

    kind: Literal["mlp", "qformer"]
    hidden: Positive
    queries: Positive
    heads: Positive
    train_mit: bool
    output_scale: Annotated[Literal["fixed", "learned"], Key(before="learned")] = "learned"


class AlignmentConfig(Section):
    """The first stage of training: the connector learns to say what a GIF shows before it learns to answer."""

    epochs: Annotated[Float, Field(ge=0), Key(before=0.0)] = 0.0
    prompt: Annotated[str, Field(pattern=r"\S"), Key(before="Describe this GIF.")] = "Describe this GIF."
    learning_rate_connector: Annotated[Float, Field(ge=0), Key(before=1e-3)] = 1e-3


class TrainingConfig(Section):
    """The training run of the connector and the adapter."""

    epochs: Annotated[Float, Field(gt=0)]
    tokens_per_step: Positive
    learning_rate_lora: Annotated[Float, Field(ge=0)]
    learning_rate_connector: Annotated[Float, Field(ge=0)]
    learning_rate_mit: Annotated[Float, Field(ge=0)]
    weight_decay: Annotated[Float, Field(ge=0)]
    warmup_ratio: Annotated[Float, Field(ge=0, le=1)]
    max_grad_norm: Annotated[Float, Field(gt=0)]
    gradient_checkpointing: bool
    validation_share: Annotated[Float, Field(ge=0, lt=0.5)]
    seed: Annotated[int, Field(ge=0)]
    checkpoint_minutes: Annotated[Float, Field(gt=0)]
    groups: Groups
    log_steps: Positive
    gpus: Annotated[Positive, Key(before=1)] = 1
    loss: Annotated[Literal["per_question", "per_token"], Key(before="per_token")] = "per_token"
    choice: Annotated[Literal["none", "beside", "instead"], Key(before="none")] = "none"


class EvaluationConfig(Section):
    """How the trained bundle is scored."""

    batch_tokens: Positive
    options_in_prompt: bool
    groups: Positive
    num_beams: Positive
    bootstrap: Positive
    seed: Annotated[int, Field(ge=0)]


class AdemConfig(Section):
    """ADEM-VL on ScienceQA, all of it: data, base models, shape, training. `preset` gives the keys that are not set."""

    preset: str
    corpus: Literal["diagrams", "scienceqa"]
    world_seed: Annotated[int, Field(ge=0)]
    world_train: Positive
    world_test: Positive
    evaluation_splits: Annotated[list[Literal["val", "test"]], Field(min_length=1, max_length=2)]
    protocol: Literal["QCM-A", "QCM-A with captions", "CQM-A", "CQM-A with captions", "released mismatch"]
    max_tokens: Annotated[int, Field(ge=16)]
    language_model: str
    language_revision: str | None
    quantisation: Literal["nf4", "none"]
    vision_model: str
    vision_revision: str | None
    normalisation: Literal["encoder", "clip", "siglip", "imagenet"]
    adapter_dim: Positive
    projector_dim: Positive
    scales: Annotated[list[Positive], Field(min_length=1)] | None
    alpha: Float
    beta: Float
    drop_ratio: Annotated[Float, Field(ge=0, lt=1)]
    use_cls: bool
    cross_attention: Literal[PLACEMENTS]
    phi: Literal[PHI_NAMES]
    learnable_threshold: bool
    layer_dropout: Annotated[Float, Field(ge=0, lt=1)]
    cross_attention_dropout: Annotated[Float, Field(ge=0, lt=1)]
    epochs: Annotated[Float, Field(gt=0)]
    warmup_epochs: Annotated[Float, Field(ge=0)]
    learning_rate: Annotated[Float, Field(ge=0)]
    weight_decay: Annotated[Float, Field(ge=0)]
    max_grad_norm: Annotated[Float, Field(ge=0)]
    batch_size: Positive
    accumulation: Positive
    gradient_checkpointing: bool
    seed: Annotated[int, Field(ge=0)]
    checkpoint_minutes: Annotated[Float, Field(gt=0)]
    log_steps: Positive
    evaluation_batch: Positive

    @model_validator(mode="wrap")
    @classmethod
    def _fill_in_from_the_preset(cls, values: Any, check: Callable[[Any], "AdemConfig"]) -> "AdemConfig":
        """What the preset gives does not count as set (`model_fields_set`): see `with_defaults`."""
        if not isinstance(values, dict) or not isinstance(values.get("preset"), str):
            return check(values)
        names = sorted(path.stem for path in ADEM_PRESETS.glob("*.yaml"))
        if values["preset"] not in names:
            raise ValueError(f"unknown adem.preset {values['preset']!r}; {nearest(values['preset'], names)}")
        path = ADEM_PRESETS / f"{values['preset']}.yaml"
        filled = check(as_declared(_read_yaml(path), AdemConfig) | values)
        filled.model_fields_set.intersection_update(values)
        return filled

    @model_validator(mode="after")
    def _splits_are_read_once(self) -> "AdemConfig":
        if len(set(self.evaluation_splits)) < len(self.evaluation_splits):
            raise ValueError(f"adem.evaluation_splits {self.evaluation_splits} names a split twice")
        return self

    @model_validator(mode="after")
    def _warm_up_ends_before_training(self) -> "AdemConfig":
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"adem.warmup_epochs {self.warmup_epochs} must be below adem.epochs {self.epochs}")
        return self


class RetrievalConfig(Section):
    """A head that brings texts and videos into one space: its shape, its loss, its training.

    `widths` are multiples of the width of the text embeddings: of the hidden layers (mlp) and, the last one, of what
    comes out. `pairs`: how many captions of a video, and as many of others, are pairs of their own that are drawn once;
    0: every caption of a batch is set against every video of it.
    """

    head: Annotated[Literal["linear", "mlp", "transformer"], Key(before="mlp")] = "mlp"
    widths: Annotated[list[Annotated[Float, Field(gt=0)]], Field(min_length=1), Key(before=[1.0])] = [1.0]
    layers: Annotated[Positive, Key(before=6)] = 6
    heads: Annotated[Positive, Key(before=8)] = 8
    dropout: Annotated[Float, Field(ge=0, lt=1), Key(before=0.1)] = 0.1
    standardise: Annotated[bool, Key(before=True)] = True
    loss: Annotated[Literal["mse", "margin", "infonce", "sigmoid"], Key(before="infonce")] = "infonce"
    mask: Annotated[bool, Key(before=True)] = True
    pairs: Annotated[int, Field(ge=0), Key(before=0)] = 0
    epochs: Annotated[Float, Field(gt=0), Key(before=30.0)] = 30.0
    batch_size: Annotated[int, Field(ge=2), Key(before=256)] = 256
    learning_rate: Annotated[Float, Field(gt=0), Key(before=1e-3)] = 1e-3
    warmup_ratio: Annotated[Float, Field(ge=0, le=1), Key(before=0.03)] = 0.03
    decay: Annotated[bool, Key(before=True)] = True
    weight_decay: Annotated[Float, Field(ge=0), Key(before=0.01)] = 0.01
    validation_share: Annotated[Float, Field(ge=0, lt=0.5), Key(before=0.1)] = 0.1
    seed: Annotated[int, Field(ge=0), Key(before=0)] = 0
    checkpoint_minutes: Annotated[Float, Field(gt=0), Key(before=1.0)] = 1.0
    log_steps: Annotated[Positive, Key(before=50)] = 50

    @model_validator(mode="after")
    def _infonce_takes_whole_batches(self) -> "RetrievalConfig":
        if self.loss == "infonce" and self.pairs:
            raise ValueError("retrieval.loss infonce compares a caption with all videos of a batch: set pairs to 0")
        return self


def tiny_adem() -> AdemConfig:
    """The preset of the built-in diagrams and the tiny models."""
    return AdemConfig.model_validate({"preset": "tiny"})


class Profile(Section):
    """All settings of a run; the same code runs every profile, only sizes differ."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$")]
    data: DataConfig
    shapes: ShapesConfig
    encoder: EncoderConfig
    language_model: LanguageModelConfig
    connector: ConnectorConfig
    alignment: AlignmentConfig = Field(default_factory=AlignmentConfig)  # earlier versions had no such section
    training: TrainingConfig
    evaluation: EvaluationConfig
    adem: AdemConfig = Field(default_factory=tiny_adem)  # a GIF bundle's profile has no such section
    retrieval: RetrievalConfig = Field(default_factory=RetrievalConfig)  # nor this one

    @model_validator(mode="after")
    def _groups_are_cached(self) -> "Profile":
        if self.encoder.frames_per_group != 16:
            raise ValueError("encoder.frames_per_group must be 16: the stored views are groups of 16 frames")
        missing = sorted({*self.training.groups, self.evaluation.groups} - {*self.data.groups})
        if missing:
            raise ValueError(
                f"training.groups and evaluation.groups ask for {missing}, which data.groups {self.data.groups} "
                "does not cache; add them there"
            )
        return self


def profile_names() -> list[str]:
    """Names of the profiles that the suite ships."""
    return sorted(path.stem for path in PROFILES.glob("*.yaml"))


def nearest(name: str, valid: list[str] | tuple[str, ...]) -> str:
    """Return `name`'s nearest neighbours among `valid` as a sentence for an error message."""
    found = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"did you mean {found[0]!r}?" if found else f"valid: {', '.join(sorted(valid))}"


def profile_keys() -> dict[str, Any]:
    """All dotted keys of a profile (`training.epochs`) with their type annotations."""
    keys = {"name": Profile.model_fields["name"]}
    for section in SECTIONS:
        model = Profile.model_fields[section].annotation
        keys |= {f"{section}.{name}": field for name, field in model.model_fields.items()}
    return keys


def _before(section: str) -> dict[str, Any]:
    """What the suite did when keys of a section did not exist, for those that declare it."""
    fields = Profile.model_fields[section].annotation.model_fields
    return {name: mark.before for name, field in fields.items() for mark in field.metadata if isinstance(mark, Key)}


def before_of(key: str) -> Any:
    """Return what was done when a profile key (`training.gpus`) did not exist; None where it declares nothing."""
    section, _, name = key.partition(".")
    return _before(section).get(name)


def is_removed(key: str) -> bool:
    """Tell whether earlier versions had this profile key: it is accepted and decides nothing."""
    section, _, name = key.partition(".")
    return name in REMOVED.get(section, ())


def as_now(section: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a section's values that an earlier version wrote as this version would have written them.

    Keys that no longer exist are left out, and those that did not exist then have what was done without them.
    """
    removed = REMOVED.get(section, frozenset())
    return _before(section) | {name: value for name, value in values.items() if name not in removed}


def deciding(sections: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a run's settings decides its result, whichever version wrote them: for comparing two of them.

    sections: values by section, or by "section.key"; what is no section is kept as it is.
    """
    found = {}
    for name, values in sections.items():
        section, _, key = name.partition(".")
        if key and key not in PACING.get(section, ()) and key not in REMOVED.get(section, ()):
            found[name] = values
        elif section in SECTIONS and isinstance(values, Mapping):
            kept = as_now(section, values)
            if section in SWITCHES and not kept[SWITCHES[section]]:
                kept = {SWITCHES[section]: kept[SWITCHES[section]]}
            found[name] = {
                own: sorted(set(value)) if own in MEMBERS.get(section, ()) else value
                for own, value in kept.items()
                if own not in PACING.get(section, ())
            }
        elif not key:
            found[name] = values
    return found


def profile_of(values: Mapping[str, Any]) -> "Profile":
    """Return the profile that an earlier version wrote, beside a bundle for example.

    A section that it lacks is left to its default, if it has one. Raises ConfigError, naming each fault.
    """
    now = {
        name: as_now(name, value) if name in SECTIONS and isinstance(value, Mapping) else value
        for name, value in values.items()
    }
    try:
        return Profile.model_validate(now)
    except ValidationError as error:
        raise ConfigError(_describe(error, "profile")) from error


ITEM = re.compile(r"""\s*("(?:[^"\\]|\\.)*"|'[^']*'|[^\s,\[\]{}"'][^,\[\]{}"']*?)\s*(,|$)""")


def read_typed(text: str, kind: Any) -> Any:
    """Read `text`, as typed or from a file, as a value of a declared type alone: 010 is ten, 1:30 no number.

    kind: str, int, float, bool, dict, a Literal of texts, `list[...]` of one of them, or one of these `| None`.
    Lists are written as [a, b] or in JSON, mappings in JSON; "", ~, null and None are the missing value of what may
    be missing. Raises ValueError that says what was expected.
    """
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return read_typed(text, parts[0])
    if origin in (Union, UnionType):
        missing = NoneType in parts and text.strip() in ("", "~", "null", "None")
        return None if missing else read_typed(text, next(part for part in parts if part is not NoneType))
    if origin is list:
        return [_read_item(item, parts[0]) for item in _items(text)]
    if kind is bool:
        return _matched(text, re.compile("true|false", re.IGNORECASE), "true or false").lower() == "true"
    if kind is int:
        return int(_matched(text, INTEGER, "a whole number"))
    if kind is float:
        value = float(_matched(text, NUMBER, "a number"))
        if not math.isfinite(value):
            raise ValueError("expected a finite number")
        return value
    if kind is dict:
        value = json.loads(text) if text.lstrip().startswith("{") else None
        if value is None:
            raise ValueError("expected a mapping in JSON")
        return value
    return text  # a text, or a choice that the schema compares


def _matched(text: str, pattern: re.Pattern, what: str) -> str:
    if not pattern.fullmatch(text.strip()):
        raise ValueError(f"expected {what}")
    return text.strip()


def _items(text: str) -> list[str]:
    """Split `[a, "b, c"]` into its items as they are written."""
    inner = text.strip()
    if not (inner.startswith("[") and inner.endswith("]")):
        raise ValueError("expected a list such as [a, b]")
    inner, found, at = inner[1:-1].strip(), [], 0
    while at < len(inner):
        item = ITEM.match(inner, at)
        if not item:
            raise ValueError("expected a list such as [a, b]")
        found.append(item[1])
        at = item.end()
    return found


def _read_item(item: str, kind: Any) -> Any:
    """Read one item of a list; only texts stand in quotation marks."""
    quoted = _is_text(kind) and item[0] in "\"'"
    return (json.loads(item) if item[0] == '"' else item[1:-1]) if quoted else read_typed(item, kind)


def _is_text(kind: Any) -> bool:
    return _is_text(get_args(kind)[0]) if get_origin(kind) is Annotated else kind is str or get_origin(kind) is Literal


class Plain(str):
    """A value as it stands in a YAML file, without quotation marks; what it means is the schema's to say."""


class _Loader(yaml.SafeLoader):
    """Leaves values as they are written; YAML 1.1 would read 010 as eight, 1:30 as ninety and no as false."""

    yaml_implicit_resolvers: ClassVar = {
        "<": yaml.SafeLoader.yaml_implicit_resolvers["<"]
    }  # keeps merging: `<<: *name`


_Loader.add_constructor(
    "tag:yaml.org,2002:str", lambda _, node: Plain(node.value) if node.style is None else node.value
)


def _read_yaml(path: Path) -> Any:
    return yaml.load(path.read_text(encoding="utf-8"), _Loader)


def as_declared(value: Any, kind: Any) -> Any:
    """Return what was read from a YAML file with each plain value read as the type that the schema declares for it.

    kind: a section of the profile, the profile, or the type of a key. What is no value of its type stays text, which
    the schema refuses by name; so does what stands in quotation marks where no text is declared.
    """
    if isinstance(value, dict) and isinstance(kind, type) and issubclass(kind, BaseModel):
        fields = kind.model_fields
        return {key: as_declared(own, fields[key].annotation if key in fields else str) for key, own in value.items()}
    if isinstance(value, list):
        return [as_declared(item, _item_kind(kind)) for item in value]
    if not isinstance(value, Plain):
        return value
    try:
        return read_typed(str(value), kind)
    except ValueError:
        return str(value)


def _item_kind(kind: Any) -> Any:
    """Return the type of a list's items; that of texts where no list is declared."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is list:
        return parts[0]
    inner = [part for part in parts if part is not NoneType] if origin in (Annotated, Union, UnionType) else []
    return _item_kind(inner[0]) if inner else str


def with_defaults(profile: Profile, defaults: Mapping[str, Any]) -> Profile:
    """Return the profile with these values by dotted key, but for keys that the person set, whatever to.

    Set is what an override or the profile's file says; what a section filled in by itself, as from a preset, is not.
    """
    for key, value in defaults.items():
        name, _, own = key.partition(".")
        section = getattr(profile, name)
        if own not in section.model_fields_set:
            profile = profile.model_copy(update={name: section.model_copy(update={own: value})})
    return profile


def parse_override(key: str, text: str) -> Any:
    """Read the command line's `text` as a value of profile key `key`, by the type that the schema declares."""
    keys = profile_keys()
    if is_removed(key):
        return text  # whatever it says, nothing asks for it
    if key not in keys:
        raise ConfigError(f"unknown profile key {key!r}; {nearest(key, list(keys))}")
    try:
        return read_typed(text, keys[key].annotation)
    except ValueError as error:
        raise ConfigError(f"profile key {key}: cannot read {text!r}: {error}") from error


def _describe(error: ValidationError, where: str) -> str:
    """Say every fault of a profile in one line each, with the nearest valid key for an unknown one."""
    lines = []
    for fault in error.errors():
        key = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            valid = list(profile_keys()) if "." in key else ["name", *SECTIONS]
            lines.append(f"unknown key {key!r}; {nearest(key, valid)}")
        elif fault["type"] == "missing":
            lines.append(f"key {key!r} is missing")
        elif fault["type"] == "value_error":
            lines.append(fault["msg"].removeprefix("Value error, "))
        else:
            lines.append(f"{key} = {fault['input']!r}: {fault['msg'][0].lower()}{fault['msg'][1:]}")
    return f"{where}: " + "; ".join(lines)


def _profile_path(name_or_path: str) -> Path:
    """Find a profile by name (shipped) or by path; an unknown one names its nearest neighbour."""
    if name_or_path.endswith((".yaml", ".yml")) or "/" in name_or_path:
        path = Path(name_or_path).expanduser()
        if not path.is_file():
            raise ConfigError(f"profile file {name_or_path} does not exist (looked in {Path.cwd()})")
        return path
    if name_or_path not in profile_names():
        hint = nearest(name_or_path, profile_names())
        raise ConfigError(f"unknown profile {name_or_path!r}; {hint} A path to a .yaml file works too.")
    return PROFILES / f"{name_or_path}.yaml"


def load_profile(name_or_path: str = "", overrides: dict[str, Any] | None = None) -> Profile:
    """Load and check a profile.

    `name_or_path`: a shipped profile's name, a .yaml path, or "" for the platform's own (locally: tiny).
    `overrides`: values by dotted key, e.g. {"training.epochs": 2}. Raises ConfigError, naming the nearest valid key.
    """
    if not name_or_path:
        name_or_path = default_profile()
    path = _profile_path(name_or_path)
    try:
        values = as_declared(_read_yaml(path), Profile)
    except UnicodeDecodeError as error:
        raise ConfigError(f"profile {path}: not a text in UTF-8: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"profile {path}: not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"profile {path}: expected a mapping of sections, found {type(values).__name__}")
    keys = list(profile_keys())
    for key, value in (overrides or {}).items():
        section, _, name = key.rpartition(".")
        if key not in keys and not is_removed(key):
            raise ConfigError(f"unknown profile key {key!r}; {nearest(key, keys)}")
        target = values.setdefault(section, {}) if section else values
        if not isinstance(target, dict):
            raise ConfigError(f"profile {path}: section {section!r} must be a mapping")
        target[name] = value
    for section, names in REMOVED.items():
        if isinstance(values.get(section), dict):
            values[section] = {name: value for name, value in values[section].items() if name not in names}
    try:
        return Profile.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_describe(error, f"profile {path.stem}")) from error
