"""Search against loops, the index on disk, what is refused, and sentences through the frozen models."""

import dataclasses

import numpy as np
import pytest
import torch
from transformers import XCLIPConfig, XCLIPModel

from helpers.config import RetrievalConfig
from helpers.models.language import BaseLanguageModel, language_model_identity, load_language_model
from helpers.models.parts import BundleError
from helpers.models.retrieval.bundle import XCLIP, Match, Source, save_head
from helpers.models.retrieval.heads import RetrievalHead
from helpers.models.retrieval.queries import text_encoder
from helpers.models.retrieval.search import INDEX, Found, Hit, Retriever, VideoIndex, head_facts, nearest
from helpers.models.xclip import encoder_identity
from tests.conftest import save_tiny_tokenizer

CPU = torch.device("cpu")


def unit(*shape: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_nearest_is_exact_in_blocks_and_ties_go_by_row():
    rng = np.random.default_rng(0)
    vectors, queries = (rng.integers(-2, 3, size=size).astype(np.float32) for size in ((30, 4), (5, 4)))  # many ties
    products = [[int(sum(a * b for a, b in zip(q, v, strict=True))) for v in vectors] for q in queries]
    assert len({*products[0]}) < 20
    for parts in ([30], [7, 20, 3], [1] * 30):
        blocks = np.split(vectors, np.cumsum(parts)[:-1])
        rows, scores = nearest(queries, blocks, 6)
        for product, found, score in zip(products, rows.tolist(), scores.tolist(), strict=True):
            assert found == sorted(range(30), key=lambda row: (-product[row], row))[:6]
            assert score == [product[row] for row in found]
    assert nearest(queries, [vectors[:2]], 6)[0].shape == (5, 2)


def test_an_index_is_read_as_it_was_written_and_replaced_whole(tmp_path):
    vectors, ids = unit(20, 8), [f"gif{n}" for n in range(20)]
    VideoIndex.build(tmp_path / "a", ids[::-1], vectors, {"encoder": "old"})
    index = VideoIndex.build(tmp_path / "a", ids, vectors, {"encoder": "one"})
    assert (index.ids, index.made_of, index.exact) == (ids, {"encoder": "one"}, True)
    rows, scores = VideoIndex(tmp_path / "a").search(vectors[[4, 9]], 1)
    assert rows.tolist() == [[4], [9]] and np.allclose(scores, 1) and index.recall(vectors) == 1


def test_many_videos_get_a_vector_index_whose_recall_is_told(tmp_path):
    """Clustered vectors, as those of a trained head: most of the truly nearest lie in the partitions looked at."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(40, 16))
    rows = centres[rng.integers(40, size=3000)] + 0.1 * rng.normal(size=(3000, 16))
    vectors = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    index = VideoIndex.build(tmp_path / "a", [str(n) for n in range(3000)], vectors, {}, exact_rows=2999)
    assert not index.exact and VideoIndex.build(tmp_path / "b", index.ids, vectors, {}, exact_rows=3000).exact
    queries = vectors[::150]
    found, scores = index.search(queries, 10)
    assert np.allclose(scores, np.einsum("qe,qke->qk", queries, vectors[found]), atol=1e-5)
    true = [sorted(range(3000), key=lambda row: -float(vectors[row] @ query))[:10] for query in queries]
    expected = np.mean([len({*one} & {*other}) / 10 for one, other in zip(found.tolist(), true, strict=True)])
    assert index.recall(queries) == pytest.approx(expected, abs=0.02) and expected > 0.8


def test_what_an_index_cannot_be_made_of_or_asked_is_said(tmp_path):
    vectors = unit(4, 8)
    for ids, changed, told in (
        (["a", "b", "a", "c"], vectors, r"1 videos are named twice, the first: 'a'"),
        (["a", "b", "c"], vectors, "3 names for 4 vectors"),
        (["a", "b", "c", "d"], vectors * [[1], [0], [1], [1]], r"1 vectors are not of unit length, the first of 'b'"),
        (["a", "b", "c", "d"], vectors * [[1], [1], [np.nan], [1]], r"1 vectors .* the first of 'c' \(nan\)"),
    ):
        with pytest.raises(ValueError, match=told):
            VideoIndex.build(tmp_path / "a", ids, changed, {})
    assert not (tmp_path / "a").exists()
    with pytest.raises(BundleError, match="there is no index of videos at"):
        VideoIndex(tmp_path / "a")
    index = VideoIndex.build(tmp_path / "a", [*"abcd"], vectors, {})
    for k in (0, 5):
        with pytest.raises(ValueError, match=rf"k is {k}: it must be from 1 to 4, the number of videos"):
            index.search(vectors, k)
    with pytest.raises(BundleError, match=r"a query has 7 numbers, the vectors of .* have 8"):
        index.search(unit(1, 7), 2)


@pytest.fixture(scope="module")
def llama(tiny_llama_dir):
    return load_language_model(BaseLanguageModel(str(tiny_llama_dir), None, "none"), CPU)


@pytest.fixture
def bundle(tmp_path, tiny_llama_dir, llama):
    """A head over input embeddings of the tiny Llama, and an index of the videos "red", "blue" and "spin"."""
    identity = language_model_identity(*llama, str(tiny_llama_dir))
    source = Source("x|k", "t", "before", "mean", "{text}", True, str(tiny_llama_dir), None, "none", identity)
    head = RetrievalHead.build(RetrievalConfig(head="linear", widths=[0.5]), 64, 64).eval()
    head.video_tower.load_state_dict(head.text_tower.state_dict())  # a video as its name is found by it
    folder = save_head(tmp_path / "head", head, source, Match(0.1, 0.05, 0.9))
    names = ["a red circle", "a blue square", "it spins"]
    with torch.no_grad():
        vectors = head.video(text_encoder(source, device=CPU)(names)).numpy()
    VideoIndex.build(folder / INDEX, names, vectors, head_facts(source, head))
    return folder, source, head


@torch.no_grad()
def test_a_text_is_the_mean_of_its_input_embeddings(bundle, llama):
    _, source, _ = bundle
    model, tokenizer = llama
    table = model.get_input_embeddings().weight
    ids = tokenizer("a red circle", add_special_tokens=False).input_ids
    with_start = sum(table[i] for i in [tokenizer.bos_token_id, *ids]) / (len(ids) + 1)
    assert torch.allclose(text_encoder(source, device=CPU)([" a red circle "])[0], with_start, atol=1e-6)
    other = dataclasses.replace(source, start=False, prompt="see {text}")
    ids = tokenizer("see a red circle", add_special_tokens=False).input_ids
    assert torch.allclose(text_encoder(other, device=CPU)(["a red circle"])[0], table[ids].mean(0), atol=1e-6)


@torch.no_grad()
def test_a_sentence_finds_its_video_or_nothing(bundle):
    folder, source, head = bundle
    retriever = Retriever.from_pretrained(folder, device=CPU)
    found = retriever.search("a blue square", k=2)
    assert found.hits[0].video == "a blue square" and len(found.hits) == 2
    assert found.hits[0].score == pytest.approx(1, abs=1e-5) and found.hits[0].above == pytest.approx(18, abs=0.01)
    embedded = text_encoder(source, device=CPU)(["a blue square", "a red circle", "it spins"])
    cosines = torch.cosine_similarity(head.text(embedded[:1]), head.text(embedded[1:]))
    assert found.hits[1].score == pytest.approx(cosines.max().item(), abs=1e-5)
    misfit = retriever.search("0 0 0 0", k=2)
    assert misfit.hits == [] and misfit.best.score < 0.9 and str(misfit).startswith("nothing matches (the nearest is ")
    retriever.match = None
    assert len(retriever.search("0 0 0 0", k=2).hits) == 2
    with pytest.raises(ValueError, match="the query is empty; type what is to be seen"):
        retriever.search("  ")
    with pytest.raises(ValueError, match="k is 4: it must be from 1 to 3"):
        retriever.search("a", k=4)
    assert str(Found(Hit("a", 0.5, 2.0), [Hit("a", 0.5, 2.0)])) == "a  0.500  +2.0 deviations"


def test_an_index_of_another_encoder_or_head_and_other_models_are_refused(bundle, tmp_path, tiny_gpt2_dir):
    folder, source, head = bundle
    vectors = unit(2, 32)
    other = RetrievalHead.build(RetrievalConfig(head="linear", widths=[0.5], seed=1), 64, 64)
    for made_of, told in (
        (
            head_facts(dataclasses.replace(source, encoder_key="y|k"), head),
            r"encoder is 'y\|k' in the index and 'x\|k'",
        ),
        (head_facts(dataclasses.replace(source, trained="u"), head), r"trained is 'u' in the index and 't'"),
        (head_facts(source, other), r"head is '\w+' in the index and '\w+' in the bundle"),
    ):
        index = VideoIndex.build(tmp_path / "other", ["a", "b"], vectors, made_of)
        with pytest.raises(BundleError, match=told):
            Retriever.from_pretrained(folder, index.path, device=CPU)
    with pytest.raises(BundleError, match="was trained on the language model"):
        Retriever.from_pretrained(folder, model=str(tiny_gpt2_dir), device=CPU)
    with pytest.raises(BundleError, match="takes texts of layer 'last', pooling 'mean'"):
        text_encoder(dataclasses.replace(source, layer="last"), device=CPU)


@torch.no_grad()
def test_xclip_searches_by_its_own_texts(tmp_path, tiny_xclip_dir):
    tokenizer = save_tiny_tokenizer(tmp_path / "xclip")
    tokenizer.add_special_tokens({"eos_token": "<|end|>"})  # X-CLIP reads a text where its token's number is highest
    tokenizer.save_pretrained(tmp_path / "xclip")
    config = XCLIPConfig.from_pretrained(tiny_xclip_dir)
    config.text_config.vocab_size, config.text_config.eos_token_id = len(tokenizer), tokenizer.eos_token_id
    torch.manual_seed(0)
    xclip = XCLIPModel(config).eval()
    xclip.save_pretrained(tmp_path / "xclip")
    ids = tokenizer("a b").input_ids
    assert ids[-1] != tokenizer.eos_token_id
    expected = xclip.get_text_features(torch.tensor([[*ids, tokenizer.eos_token_id]]))
    expected = getattr(expected, "pooler_output", expected)
    source = Source("x", "", XCLIP, "", "{text}", True, str(tmp_path / "xclip"), None, "none", encoder_identity(xclip))
    encode = text_encoder(source, device=CPU)
    assert torch.allclose(encode(["a b"]), expected, atol=1e-6)
    long = encode(["a " * 40])
    room = tokenizer("a " * 40).input_ids[:15]
    cut = xclip.get_text_features(torch.tensor([[*room, tokenizer.eos_token_id]]))
    assert torch.allclose(long, getattr(cut, "pooler_output", cut), atol=1e-6)
    folder = save_head(tmp_path / "x", None, source)
    own = torch.nn.functional.normalize(expected, dim=-1).numpy()
    VideoIndex.build(folder / INDEX, ["it", "not"], np.concatenate([own, -own]), head_facts(source, None))
    found = Retriever.from_pretrained(folder, device=CPU).search("a b", k=2)
    assert [hit.video for hit in found.hits] == ["it", "not"] and found.hits[0].score == pytest.approx(1, abs=1e-5)
