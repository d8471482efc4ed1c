"""Base models are told by every layer, whatever file, precision or quantisation holds them."""

import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, XCLIPModel

from helpers.models.adem_vl import AdemVL, AdemVLError
from helpers.models.digests import language_model_digest, language_tensors, layers_digest
from helpers.models.gif_qa import BundleError, GifQA, load_bundle
from helpers.models.xclip import encoder_identity, load_xclip
from helpers.workspace import find_model, repo_root

TINY = repo_root() / "helpers" / "assets" / "tiny"


def changed_copy(source: str, folder, change) -> str:
    """A copy of a tiny model's folder whose tensors went through `change(name, tensor)`."""
    shutil.copytree(find_model(source), folder)
    tensors = load_file(folder / "model.safetensors")
    changed = {name: change(name, tensor).contiguous() for name, tensor in tensors.items()}
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def noise(part: str):
    def change(name, tensor):
        return torch.randn(tensor.shape, dtype=torch.float32).to(tensor.dtype) if part in name else tensor

    return change


def aged(source, folder):
    """A bundle as it was made before it told every layer."""
    shutil.copytree(source, folder)
    for path in (folder / "bundle.json", folder / "adem_vl.json"):
        if path.is_file():
            facts = json.loads(path.read_text())
            parts = facts["base"].values() if "base" in facts else [facts["language_model"], facts["encoder"]]
            for part in parts:
                del part["identity"]["digest"]
            path.write_text(json.dumps(facts))
    return folder


@pytest.mark.parametrize("layer", [0, 2, 4])
def test_another_layer_is_another_language_model(tmp_path, layer):
    other = changed_copy("tiny/llama", tmp_path / "llama", noise(f"layers.{layer}.mlp.down_proj"))
    with pytest.raises(BundleError, match="other weights"):
        load_bundle(TINY / "bundle", language_model=other)


def test_layers_in_another_order_are_another_language_model(tmp_path):
    other = changed_copy("tiny/llama", tmp_path / "llama", lambda name, tensor: tensor)
    tensors = load_file(f"{other}/model.safetensors")
    swap = {".1.": ".2.", ".2.": ".1."}
    mixed = {next((n.replace(a, b) for a, b in swap.items() if a in n), n): t for n, t in tensors.items()}
    save_file(mixed, f"{other}/model.safetensors", metadata={"format": "pt"})
    assert language_model_digest(other, True) != language_model_digest(find_model("tiny/llama"), True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_model_in_another_precision_or_file_is_the_same(tmp_path, dtype):
    source = changed_copy("tiny/llama", tmp_path / "bf16", lambda _, tensor: tensor.bfloat16())
    wanted = language_model_digest(source, True)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    assert layers_digest(language_tensors(model.state_dict().items(), True)) == wanted
    model.save_pretrained(tmp_path / "parts", max_shard_size="500KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    assert language_model_digest(tmp_path / "parts", True) == wanted
    (tmp_path / "bin").mkdir()
    state = {f"transformer.{n}": t for n, t in model.state_dict().items()}
    for zipped in (True, False):  # the format of PyTorch since 1.6, and the one before
        torch.save(state, tmp_path / "bin" / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        assert language_model_digest(tmp_path / "bin", True) == wanted


def test_four_bits_do_not_change_it():
    model = load_bundle(TINY / "bundle")  # the tiny profile is in NF4
    told = model.base["language_model"]["identity"]["digest"]
    assert told == language_model_digest(find_model("tiny/llama"), True)


@pytest.mark.parametrize("part", ["vision_model.encoder.layers.3.mlp.fc1", "visual_projection", "mit.encoder.layers.0"])
def test_another_video_encoder_is_refused(tmp_path, part):
    other = changed_copy("tiny/xclip", tmp_path / "xclip", noise(part))
    with pytest.raises(BundleError, match="video encoder"):
        GifQA.from_pretrained(TINY / "bundle", video_model=other)


def test_the_text_tower_of_an_encoder_does_not_count(tmp_path):
    full = XCLIPModel.from_pretrained(find_model("tiny/xclip"))
    told = encoder_identity(full)["digest"]
    with torch.no_grad():
        for tensor in full.text_model.parameters():
            tensor.normal_()
    assert encoder_identity(full)["digest"] == told == encoder_identity(load_xclip("tiny/xclip"))["digest"]


def test_a_bundle_without_digests_loads_with_one_warning_and_the_old_check(tmp_path):
    old = aged(TINY / "bundle", tmp_path / "bundle")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        GifQA.from_pretrained(old)
    assert [str(w.message).count("before bundles told every layer") for w in caught if "bundle" in str(w.message)] == [
        1
    ]
    other = changed_copy("tiny/llama", tmp_path / "llama", noise("embed_tokens"))
    with pytest.raises(BundleError), pytest.warns(UserWarning, match="before bundles told"):
        load_bundle(old, language_model=other)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*before bundles told")
        GifQA.from_pretrained(TINY / "bundle")


@pytest.mark.parametrize(
    ("source", "given", "part"),
    [
        ("tiny/science_llama", "language_model", "layers.1.self_attn.q_proj"),
        ("tiny/science_clip", "vision_model", "layers.1.mlp.fc1"),
    ],
)
def test_adem_vl_refuses_other_layers(tmp_path, source, given, part):
    other = changed_copy(source, tmp_path / "other", noise(part))
    with pytest.raises(AdemVLError, match="other weights"):
        AdemVL.from_pretrained(TINY / "adem_vl", **{given: other})
    old = aged(TINY / "adem_vl", tmp_path / "adem_vl")
    with pytest.warns(UserWarning, match="before bundles told") as caught:
        AdemVL.from_pretrained(old, **{given: other})
    assert len([w for w in caught if "before bundles told" in str(w.message)]) == 1
