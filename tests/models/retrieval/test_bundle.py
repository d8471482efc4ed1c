"""A head's bundle: what is saved is loaded, and what is amiss is named."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.config import RetrievalConfig
from helpers.models.parts import BundleError
from helpers.models.retrieval.bundle import FACTS, TENSORS, Match, Source, load_head, read_head, save_head
from helpers.models.retrieval.heads import RetrievalHead

SOURCE = Source("x|16x64px|crop|abc|v2", "def", "before", "mean", "{text}", True, "tiny/llama", None, "none", {"a": 1})


@pytest.fixture(params=["mlp", "transformer"])
def head(request):
    head = RetrievalHead.build(RetrievalConfig(head=request.param, heads=2, layers=1), 6, 4)
    head.text_scale.fit(torch.randn(9, 6))
    return head.eval()


@pytest.fixture
def folder(head, tmp_path):
    return save_head(tmp_path / "head", head, SOURCE, Match(0.1, 0.2, 0.5), {"metrics": {"MRR": 0.8}})


@torch.no_grad()
def test_what_is_saved_is_loaded(head, folder):
    assert sorted(path.name for path in folder.iterdir()) == [FACTS, TENSORS]
    facts, loaded = read_head(folder), load_head(folder)
    assert (facts.source, facts.match, facts.info) == (SOURCE, Match(0.1, 0.2, 0.5), {"metrics": {"MRR": 0.8}})
    x, mask = (torch.randn(2, 3, 6), torch.ones(2, 3, dtype=torch.bool)) if facts.config.head == "transformer" else (
        torch.randn(2, 6), None)  # fmt: skip
    assert torch.equal(loaded.text(x, mask), head.text(x, mask))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_a_bundle_without_a_head_has_no_tensors(tmp_path):
    folder = save_head(tmp_path, None, SOURCE)
    assert load_head(folder) is None and read_head(folder).match is None
    save_file({"x": torch.zeros(1)}, folder / TENSORS)
    with pytest.raises(BundleError, match=r"head\.safetensors is not expected"):
        load_head(folder)


def test_a_tensor_that_is_amiss_is_named(folder):
    whole = load_file(folder / TENSORS)
    name = "text_scale.deviation"
    rest = {key: tensor for key, tensor in whole.items() if key != name}
    for tensors, told in (
        (rest, f"missing: {name}"),
        (whole | {"more": torch.zeros(1)}, "not expected: more"),
        (rest | {name: torch.ones(7)}, rf"{name} is \[7\], expected \[6\]"),
        (rest | {name: torch.full((6,), torch.nan)}, rf"not finite .* in {name}"),
    ):
        save_file(tensors, folder / TENSORS)
        with pytest.raises(BundleError, match=told):
            load_head(folder)
    (folder / TENSORS).unlink()
    with pytest.raises(BundleError, match=r"head\.safetensors is missing"):
        load_head(folder)


def test_facts_that_are_amiss_are_named(folder, tmp_path):
    facts = json.loads((folder / FACTS).read_text())

    def told(changed: dict) -> str:
        (folder / FACTS).write_text(json.dumps(changed))
        with pytest.raises(BundleError) as error:
            read_head(folder)
        return str(error.value)

    assert "'another', format 1; this code reads 'text-video retrieval', format 1" in told(facts | {"kind": "another"})
    source = dict(facts["source"])
    del source["pooling"]
    assert "amiss: ['pooling']" in told(facts | {"source": source})
    assert "amiss: ['threshold']" in told(facts | {"match": {"mean": 0.1, "deviation": 0.2}})
    assert "amiss: ['more']" in told(facts | {"more": 1})
    wrong = facts["head"] | {"config": facts["head"]["config"] | {"head": "tree"}}
    assert "describes no head that this code knows" in told(facts | {"head": wrong})
    with pytest.raises(BundleError, match=r"is no bundle: it has no bundle\.json"):
        read_head(tmp_path / "nowhere")


def test_a_head_that_diverged_is_not_written(head, tmp_path):
    with torch.no_grad():
        next(head.parameters())[0] = torch.inf
    with pytest.raises(BundleError, match="was not written"):
        save_head(tmp_path / "head", head, SOURCE)
    assert not (tmp_path / "head").exists()


def test_how_far_above_is_told_in_deviations():
    assert Match(0.2, 0.1, 0.4).above(0.5) == pytest.approx(3.0)
