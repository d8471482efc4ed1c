"""Answers, baselines, tables and ablations of ADEM-VL on ScienceQA, against counts by hand."""

import math
import weakref

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from helpers.answers import regions
from helpers.answers import scienceqa as answering
from helpers.assets.pretraining import train_tokenizer
from helpers.config import load_profile
from helpers.corpora import diagrams, load_problems
from helpers.corpora.scienceqa import PromptStyle, load, open_image, prompt
from helpers.corpora.tasks import ScoreError
from helpers.models import adem_vl
from helpers.models.adem_vl import parameter_comparison
from helpers.models.adem_vl.sequences import collate, encode, image_tensor
from helpers.scoring import mean_interval
from helpers.scoring import scienceqa_tables as tables
from helpers.scoring.scienceqa import WRONG
from helpers.stage.pace import DeadlineReached
from helpers.store import keep
from helpers.sweeps import adem_vl as sweep
from helpers.sweeps.runs import ablation_table
from helpers.training.adem_vl import build_model, train_adem
from helpers.workspace.weights import ModelNotFound


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The tiny profile on random backbones, with a tokenizer in which each of " A" to " E" is a token.

    The head's rows of these tokens are longer than the others and far apart: most written answers are letters, of
    several choices, and some of none.
    """
    folder, language = tmp_path_factory.mktemp("tiny-clip"), tmp_path_factory.mktemp("science-llama")
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(**size, image_size=64, patch_size=8)).save_pretrained(folder)
    tokenizer = train_tokenizer([" A B C D E Question: Context: Options: Response:The answer is"] * 5, 340)
    tokenizer.save_pretrained(language)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    llama = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=4096, initializer_range=0.2, **sizes, **ids)
    language_model = LlamaForCausalLM(llama)
    letters = [tokenizer(f"is {c}", add_special_tokens=False).input_ids[-1] for c in "ABCDE"]
    with torch.no_grad():
        language_model.lm_head.weight[letters] = 4 * torch.randn(5, 32, generator=torch.Generator().manual_seed(2))
    language_model.save_pretrained(language)
    own = {"language_model": str(language), "vision_model": str(folder), "batch_size": 4, "evaluation_batch": 5}
    own |= {"projector_dim": 8, "adapter_dim": 2, "max_tokens": 400, "epochs": 1, "warmup_epochs": 0.5}
    return load_profile("tiny", {f"adem.{key}": value for key, value in own.items()}).adem


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    folder = diagrams.write(tmp_path_factory.mktemp("d") / "w", seed=2, train=12, val=1, test=40)
    return load(folder, splits=("train", "test"), captions=True).problems


@pytest.fixture(scope="module")
def model(config):
    """A model whose answers depend on the image, unlike those of a fresh one."""
    model = build_model(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in model.adapter_tensors().values():
            tensor.normal_(0, 0.5, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def test_rows(problems):
    return problems[problems["split"] == "test"].reset_index(drop=True)


@pytest.fixture(scope="module")
def answers(model, config, test_rows):
    return answering.predict(model, test_rows, config)


def test_answers_are_those_of_every_problem_alone(model, config, test_rows, answers):
    """Batches, padding and order change nothing: each problem by itself, its logits read by hand."""
    tokenizer = model.tokenizer
    assert answers["pid"].tolist() == test_rows["pid"].tolist()
    for row, answer in zip(test_rows.to_dict("records"), answers.to_dict("records"), strict=True):
        text = prompt(row, PromptStyle("QCM-A")) + "The answer is"
        sample = encode(tokenizer, text, has_image=bool(row["image"]))
        pixels = open_image(row["image"]) if row["image"] else None
        batch = collate([sample], image_tensor(pixels, 64)[None] if row["image"] else None, 0)
        del batch["labels"]
        with torch.no_grad():
            logits = model(**batch)["logits"][0, -1]
        letters = [tokenizer(f"is {c}", add_special_tokens=False).input_ids[-1] for c in "ABCDE"[: len(row["choices"])]]
        expected = logits.log_softmax(-1)[letters]
        assert answer["scores"] == pytest.approx(expected.tolist(), abs=1e-3)
        assert answer["likeliest"] == int(expected.argmax())
        written = tokenizer.decode([int(logits.argmax())])
        assert answer["generated"] == written
        capitals = [c for c in written if c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
        index = "ABCDE".find(capitals[0]) if capitals else -1
        assert answer["prediction"] == (index if 0 <= index < len(row["choices"]) else WRONG)
    counts = answers["prediction"].value_counts()
    assert counts.drop(WRONG).sum() >= len(answers) / 2 and len(counts) >= 4, "too little was compared"
    letters = answers["generated"].str.strip().isin(list("ABCDE"))
    assert (letters & (answers["prediction"] == WRONG)).any(), "no letter beyond the choices"


def test_a_problem_that_is_too_long_is_wrong_and_not_cut(model, config, test_rows, answers):
    long = test_rows.copy()
    long.at[4, "hint"] = "word " * 500
    found = answering.predict(model, long, config)
    assert found.loc[4, ["generated", "prediction", "likeliest"]].tolist() == ["", WRONG, WRONG]
    assert found.loc[4, "scores"] == []
    others = [i for i in range(len(long)) if i != 4]
    assert found.loc[others, "prediction"].tolist() == answers.loc[others, "prediction"].tolist()
    assert "the window has 400" in found.loc[4, "too_long"] and (found.loc[others, "too_long"] == "").all()


def test_what_is_too_long_is_counted_and_listed_apart(table):
    """Wrong in every score, but no failure to write or to choose a letter; a twin's own window counts for the twin."""
    reasons = ["", "", "", "", "", "512 tokens; the window has 500"]
    long = table.assign(prediction=[0, 1, 0, 0, WRONG, WRONG], likeliest=[0, 1, 2, 0, 1, WRONG], too_long=reasons)
    long = long.assign(text_only_too_long=[""] * 6)
    scored = tables.scores(long)
    assert [(s["missing"], s["failed"], s["correct"]) for s in (scored[""], scored["likelihood"])] == [
        (1, 1, 3),
        (1, 0, 5),
    ]
    assert scored["text_only"]["missing"] == 0 and scored[""]["total"] == 6
    assert tables.split_by_image(long)[""]["all"][:2] == (3, 6)
    metrics = tables.flat_metrics(scored, long)
    assert (metrics["too_long"], metrics["likelihood_too_long"], metrics["text_only_too_long"]) == (1, 1, 0)
    listed = tables.too_long(long)
    assert listed.values.tolist() == [["f", "model, written letter", "512 tokens; the window has 500"]]


def test_answers_are_kept_once_they_are_there(tmp_path):
    table = pd.DataFrame({"pid": ["a"], "scores": [[0.5, 0.25]]})
    first = keep(tmp_path / "answers" / "model.parquet", lambda: table)
    again = keep(tmp_path / "answers" / "model.parquet", lambda: pytest.fail("asked again"))
    pd.testing.assert_frame_equal(first, again)
    assert again["scores"][0].tolist() == [0.5, 0.25]
    with pytest.raises(DeadlineReached):
        keep(tmp_path / "twin.parquet", lambda: (_ for _ in ()).throw(DeadlineReached("late")))
    assert not (tmp_path / "twin.parquet").exists()


def test_a_passed_deadline_is_said(model, config, test_rows):
    with pytest.raises(DeadlineReached):
        answering.predict(model, test_rows, config, deadline=-1.0)


def test_no_answer_rests_on_scores_that_are_not_finite(model, config, test_rows, monkeypatch):
    """One logit of 340 is NaN in the last row of every batch: of problems, and of pictures with a patch hidden."""
    original = model.next_logits

    def next_logits(**batch):
        logits = original(**batch).clone()
        logits[-1, 7] = math.nan
        return logits

    monkeypatch.setattr(model, "next_logits", next_logits)
    with pytest.raises(ScoreError, match=r"problem \w+ are not finite") as error:
        answering.predict(model, test_rows, config)
    assert any(f"problem {pid} " in str(error.value) for pid in test_rows["pid"])
    row = test_rows[test_rows["image"] != ""].iloc[0].to_dict()
    with pytest.raises(ScoreError, match=f"problem {row['pid']} are not finite"):
        regions.worth(model, row, config)


def test_images_matter_and_blind_answers_do_not_know_them(model, config, test_rows, answers):
    other = answering.predict(model, test_rows, config, images=answering.shuffle_images(test_rows, 0))
    blind = answering.predict(model, test_rows, config, blind=True)
    seen = (test_rows["image"] != "").to_numpy()
    changed = np.array([a != b for a, b in zip(answers["scores"], other["scores"], strict=True)])
    assert changed[seen].all()
    assert np.allclose(
        np.concatenate(list(answers["scores"][~seen])), np.concatenate(list(other["scores"][~seen])), atol=1e-4
    )
    without = test_rows.assign(image="")
    again = answering.predict(model, without, config)
    assert np.allclose(np.concatenate(list(blind["scores"])), np.concatenate(list(again["scores"])), atol=1e-4)


def test_shuffled_images_are_others_of_the_same_skill(test_rows):
    found = answering.shuffle_images(test_rows, 3)
    seen = test_rows[test_rows["image"] != ""].set_index("pid")
    assert found.keys() == set(seen.index) and sorted(found.values()) == sorted(seen["image"])
    skill = dict(zip(seen["image"], seen["skill"], strict=True))
    alone = seen["skill"].value_counts().loc[lambda n: n == 1].index
    for pid, path in found.items():
        assert path != seen.loc[pid, "image"] or len(alone) == 1
        if seen.loc[pid, "skill"] not in alone:
            assert skill[path] == seen.loc[pid, "skill"]
    assert found != answering.shuffle_images(test_rows, 4)


def pictured(skills):
    return pd.DataFrame({"pid": [f"p{i}" for i in range(len(skills))], "skill": skills}).assign(
        image=lambda t: "image of " + t["pid"]
    )


@pytest.mark.parametrize("seed", range(20))
def test_a_problem_alone_in_its_skill_never_keeps_its_own_image(seed):
    table = pictured(["maps"] * 3 + ["plants"])
    found = answering.shuffle_images(table, seed)
    assert found.keys() == set(table["pid"])
    assert all(path != f"image of {pid}" for pid, path in found.items())
    assert sorted(found[pid] for pid in ("p0", "p1", "p2")) == ["image of p0", "image of p1", "image of p2"]
    assert found["p3"] in {"image of p0", "image of p1", "image of p2"}
    assert found == answering.shuffle_images(table, seed)
    alone = answering.shuffle_images(pictured(["maps", "plants"]), seed)
    assert alone == {"p0": "image of p1", "p1": "image of p0"}


def test_the_only_image_of_all_is_told_and_none_is_nothing():
    table = pictured(["maps", "plants"])
    table.loc[0, "image"] = ""
    with pytest.warns(UserWarning, match="p1 is the only problem with an image"):
        found = answering.shuffle_images(table, 0)
    assert found.get("p1", "image of p1") == "image of p1"
    assert answering.shuffle_images(table.assign(image=""), 0) == {}


def test_no_problems_get_no_answers(model, config, test_rows, answers):
    none = answering.predict(model, test_rows.head(0), config)
    assert len(none) == 0 and none.columns.tolist() == answers.columns.tolist()
    assert answers.columns.tolist() == ["pid", "scores", "generated", "prediction", "likeliest", "too_long"]
    blind = answering.predict(model, test_rows.head(0), config, blind=True, images={})
    joined = answering.join_predictions(test_rows.head(0), test_rows, {"": none, "text_only": blind})
    assert len(joined) == 0 and {"prediction", "text_only_prediction", "majority_prediction"} <= set(joined)


@pytest.fixture
def table():
    """Six problems answered by hand: three with an image, of which the model gets two."""
    return pd.DataFrame(
        {
            "pid": list("abcdef"),
            "question": ["q"] * 6,
            "choices": [["x", "y"], ["x", "y"], ["x", "y", "z", "w"], ["x", "y"], ["x", "y"], ["x", "y"]],
            "answer": [0, 1, 2, 0, 1, 0],
            "subject": ["natural science"] * 3 + ["social science"] * 3,
            "grade": [3, 8, 3, 8, 3, 8],
            "skill": [""] * 6,
            "image": [True, True, True, False, False, False],
            "hint": [False, True, False, True, False, False],
            "scores": [[]] * 6,
            "generated": ["A"] * 6,
            "prediction": [0, 1, 0, 0, WRONG, 0],
            "likeliest": [0, 1, 2, 0, 1, 0],
            "text_only_prediction": [1, 0, 0, 0, 1, 0],
            "first_choice_prediction": [0] * 6,
        }
    )


def test_scores_are_counted_from_the_table(table):
    scored = tables.scores(table)
    assert scored.keys() == {"", "likelihood", "text_only", "first_choice"}
    assert (scored[""]["correct"], scored[""]["failed"], scored[""]["accuracy"]) == (4, 1, 66.67)
    assert (scored[""]["IMG"], scored[""]["TXT"], scored[""]["NO"]) == (66.67, 100.0, 50.0)
    assert [scored[""][name] for name in ("NAT", "SOC", "G1-6", "G7-12")] == [66.67, 66.67, 33.33, 100.0]
    assert scored["likelihood"]["accuracy"] == 100.0 and scored["text_only"]["IMG"] == 0.0
    split = tables.split_by_image(table)
    assert split[""]["image"][:2] == (2, 3) and split[""]["text"][:2] == (2, 3) and split[""]["all"][:2] == (4, 6)
    assert tables.chance(table) == pytest.approx(100 * (5 * 0.5 + 0.25) / 6)
    metrics = tables.flat_metrics(scored, table)
    assert metrics["accuracy"] == 66.67 and metrics["text_only_IMG"] == 0.0
    assert metrics["chance_IMG"] == pytest.approx(100 * 1.25 / 3)


def test_published_figures_stand_below_the_runs(table):
    shown = tables.result_table(tables.scores(table))
    assert shown.loc["model, written letter", "average"] == 66.67
    assert shown.loc["paper, LLaMA-7B (20 epochs)", "average"] == 93.85
    paper = shown.loc["paper, LLaMA-7B (20 epochs)"]
    # the published average is the subjects' mean weighted by their share of the test set (2252, 889 and 1100 problems)
    assert (2252 * paper["NAT"] + 889 * paper["SOC"] + 1100 * paper["LAN"]) / 4241 == pytest.approx(93.85, abs=0.01)
    assert [shown.loc[name, "average"] for name in shown.index[-4:]] == [93.61, 85.81, 86.4, 88.4]
    assert shown.loc["random choice, by ScienceQA's authors", "average"] == 39.83
    student = shown.loc["student, 5 epochs"]
    groups = {"NAT": 86.06, "SOC": 83.46, "LAN": 87.18, "TXT": 85.00, "IMG": 79.72, "NO": 89.06}
    for name, value in (groups | {"G1-6": 86.71, "G7-12": 84.18}).items():
        assert student[name] == value, name
    assert (2252 * student["NAT"] + 889 * student["SOC"] + 1100 * student["LAN"]) / 4241 == pytest.approx(
        85.81, abs=0.01
    )
    (released,) = [name for name in shown.index if "released weights" in name]
    assert "QCM-A with captions" in released and shown.loc[released, "average"] == 93.61


def test_results_tell_sizes_and_the_headlines_interval(table):
    shown = tables.result_table(tables.scores(table))
    sizes = shown.loc["problems of this run"]
    assert sizes[["NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12", "average"]].tolist() == [
        3, 3, 0, 2, 3, 2, 3, 3, 6
    ]  # fmt: skip
    low, high = shown.loc["model, written letter", ["average, 95 % from", "to"]]
    for bound in (low / 100, high / 100):  # where 4 of 6 lies 1.96 standard errors away
        assert abs(bound - 4 / 6) / math.sqrt(bound * (1 - bound) / 6) == pytest.approx(1.96, abs=0.01)
    assert shown.loc["paper, LLaMA-7B (20 epochs)", ["average, 95 % from", "to"]].isna().all()


def test_predictions_join_only_answers_to_the_same_problems(problems, test_rows, answers, tmp_path):
    train = problems[problems["split"] == "train"]
    joined = answering.join_predictions(test_rows, train, {"": answers, "text_only": answers})
    assert len(joined) == len(test_rows)
    joined.to_parquet(tmp_path / "p.parquet")
    back = pd.read_parquet(tmp_path / "p.parquet")
    assert tables.scores(back) == tables.scores(joined)
    needed = {"pid", "scores", "generated", "prediction", "answer", "likeliest", "text_only_prediction"}
    assert needed | {"first_choice_prediction", "majority_prediction"} <= set(back)
    first = sum(row.answer == 0 for row in test_rows.itertuples())
    assert tables.scores(back)["first_choice"]["correct"] == first
    with pytest.raises(ValueError, match="to other problems"):
        answering.join_predictions(test_rows, train, {"": answers.iloc[::-1]})


def test_parameters_beside_the_papers(model):
    table = parameter_comparison(model)
    assert table.loc["total", "paper, LLaMA-7B"] == 4_530_432
    assert table.loc["total", "this run"] == sum(t.numel() for t in model.adapter_tensors().values())


def test_intervals_are_students():
    middle, half = mean_interval(np.array([90.0, 92.0, 94.0]))
    assert (middle, half) == (92.0, pytest.approx(4.302653 * 2 / math.sqrt(3), rel=1e-4))  # t of 2 degrees of freedom
    assert mean_interval(np.array([5.0])) == (5.0, math.inf)
    twelve = np.arange(12.0)
    assert mean_interval(twelve)[1] == pytest.approx(2.200985 * twelve.std(ddof=1) / math.sqrt(12), rel=1e-3)


def test_an_ablation_trains_each_row_with_each_seed_and_goes_on(problems, test_rows, config, tmp_path, monkeypatch):
    train = problems[problems["split"] == "train"]
    rows = {"one": {"alpha": 0.1}, "two": {"alpha": 0.3}}
    monkeypatch.setattr(sweep, "ablation_rows", lambda name, grid: rows)
    with pytest.raises(DeadlineReached, match="'one', seed 0"):
        sweep.run_ablation("ladder", train, test_rows, config, tmp_path, seeds=2, deadline=-1.0)
    runs = sweep.run_ablation("ladder", train, test_rows, config, tmp_path, seeds=2)
    assert runs[["row", "seed"]].values.tolist() == [["one", 0], ["one", 1], ["two", 0], ["two", 1]]
    monkeypatch.setattr(sweep, "predict", None)  # what is finished is not asked again
    again = sweep.run_ablation("ladder", train, test_rows, config, tmp_path, seeds=2)
    pd.testing.assert_frame_equal(again, runs)
    table = ablation_table(runs)
    assert table["row"].tolist() == ["one", "two"] and table["seeds"].tolist() == [2, 2]
    first = runs[runs["row"] == "one"]["image"]
    assert table["image"][0] == pytest.approx(first.mean())
    assert table["image_high"][0] - table["image"][0] == pytest.approx(12.7062 * first.std() / math.sqrt(2), rel=1e-4)


def test_an_ablation_holds_one_base_model_at_a_time(problems, test_rows, config, tmp_path, monkeypatch):
    train = problems[problems["split"] == "train"]
    rows = {"one": {"alpha": 0.1}, "two": {"alpha": 0.3}}
    monkeypatch.setattr(sweep, "ablation_rows", lambda name, grid: rows)
    loaded, load_llm = [], adem_vl.model._load_llm

    def watched(*args):
        assert not [model for model in loaded if model() is not None], "another base model is still in memory"
        model, tokenizer = load_llm(*args)
        loaded.append(weakref.ref(model))
        return model, tokenizer

    monkeypatch.setattr(adem_vl.model, "_load_llm", watched)
    sweep.run_ablation("ladder", train, test_rows, config, tmp_path, seeds=2)
    assert len(loaded) == 4


@pytest.mark.parametrize(
    ("values", "error", "said"),
    [
        ({"scales": [64, 25]}, ValueError, r"scales \[64, 25\].*8x8 patch grid"),
        ({"language_model": "nobody/no-such-llama"}, ModelNotFound, "no-such-llama"),
    ],
)
def test_an_ablation_that_cannot_end_does_not_begin(
    problems, test_rows, config, tmp_path, monkeypatch, values, error, said
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sweep, "ablation_rows", lambda name, grid: {"one": {}, "two": values})
    monkeypatch.setattr(sweep, "build_model", lambda config: pytest.fail("began to train"))
    train = problems[problems["split"] == "train"]
    with pytest.raises(error, match=said):
        sweep.run_ablation("ladder", train, test_rows, config, tmp_path)


def test_pictures_of_a_problem_that_is_too_long_are_refused(model, config, test_rows):
    row = test_rows[test_rows["image"] != ""].iloc[0].to_dict() | {"hint": "word " * 500}
    for picture in (regions.attended, regions.worth):
        with pytest.raises(ValueError, match=rf"problem {row['pid']} is too long .* tokens; the window has 400"):
            picture(model, row, config)


def test_patches_are_hidden_a_batch_at_a_time(model, config, test_rows, monkeypatch):
    sizes, original = [], model.next_logits
    monkeypatch.setattr(
        model, "next_logits", lambda **batch: sizes.append(len(batch["input_ids"])) or original(**batch)
    )
    regions.worth(model, test_rows[test_rows["image"] != ""].iloc[0].to_dict(), config)
    assert max(sizes) == config.evaluation_batch == 5 and sum(sizes) >= 65


def test_attended_patches_sum_to_one_and_follow_the_scores(model, config, test_rows):
    """Against the formula by hand, from the scores of a forward whose fusion is watched."""
    row = test_rows[test_rows["image"] != ""].iloc[0].to_dict()
    weights = regions.attended(model, row, config)
    assert weights.shape == (8, 8) and weights.sum() == pytest.approx(1.0) and (weights >= 0).all()
    text = prompt(row, PromptStyle("QCM-A")) + "The answer is"
    pixels = image_tensor(open_image(row["image"]), 64)[None]
    batch = collate([encode(model.tokenizer, text, has_image=True)], pixels, 0)
    caught = []
    original = torch.Tensor.kthvalue
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "kthvalue", lambda self, *a, **k: caught.append(self) or original(self, *a, **k))
        model.next_logits(**{name: t for name, t in batch.items() if name != "labels"})
    with torch.no_grad():
        patches, _ = model.visual_features(batch["pixel_values"])
        grid = patches[0].view(8, 8, -1)
        corners = [(i, j) for i in range(0, 8, 2) for j in range(0, 8, 2)]
        coarse = torch.stack([grid[i : i + 2, j : j + 2].mean((0, 1)) for i, j in corners])
        values = config.beta * model.projector(torch.cat([patches[0], coarse])) + model.value_embedding[0]
    expected = torch.zeros(80)
    for scores in caught:
        last = scores[0, -1]
        kept = last >= last.sort().values[8]  # a tenth of 80 positions is dropped
        expected += (last * kept).abs() * values.norm(dim=-1)
    by_patch = expected[:64].view(8, 8) + expected[64:].view(4, 4).repeat_interleave(2, 0).repeat_interleave(2, 1) / 4
    assert np.allclose(weights, by_patch / by_patch.sum(), atol=1e-5)
    with pytest.raises(ValueError, match="has no image"):
        regions.attended(model, row | {"image": ""}, config)


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_map_of_what_is_attended_is_even_without_weights_and_refused_with_broken_ones(
    model, config, test_rows, monkeypatch, number
):
    row = test_rows[test_rows["image"] != ""].iloc[0].to_dict()
    weights = torch.zeros(1, model.config.positions)
    monkeypatch.setattr(model, "contributions", lambda **_: weights)
    grid = model.config.grid
    assert regions.attended(model, row, config).tolist() == [[1 / grid**2] * grid] * grid
    weights[0, 3] = number
    with pytest.raises(ScoreError, match=f"problem {row['pid']} are not finite"):
        regions.attended(model, row, config)


def test_a_patch_is_worth_what_its_hiding_costs(model, config, test_rows):
    """Two patches by hand, one of them at the image's corner, where the square is cut."""
    row = test_rows[test_rows["image"] != ""].iloc[1].to_dict()
    found = regions.worth(model, row, config)
    assert found.shape == (8, 8)
    pixels = image_tensor(open_image(row["image"]), 64)
    sample = encode(model.tokenizer, prompt(row, PromptStyle("QCM-A")) + "The answer is", has_image=True)

    def told(image):
        batch = collate([sample], image[None], 0)
        del batch["labels"]
        with torch.no_grad():
            return model(**batch)["logits"][0, -1].log_softmax(-1)

    whole = told(pixels)
    for (line, column), (rows, columns) in {
        (0, 7): (slice(0, 16), slice(48, 64)),
        (3, 4): (slice(16, 40), slice(24, 48)),
    }.items():
        hidden = pixels.clone()
        hidden[:, rows, columns] = pixels.mean((1, 2))[:, None, None]
        expected = whole.max() - told(hidden)[whole.argmax()]
        assert found[line, column] == pytest.approx(float(expected), abs=1e-3)
    with pytest.raises(ValueError, match="has no image"):
        regions.worth(model, row | {"image": ""}, config)


def test_the_real_slice_trains_and_every_subgroup_is_reported(shared_data, tmp_path):
    """All 1,773 problems of the real slice on the shipped backbones: none is too long, and the report is whole."""
    folder = shared_data / "scienceqa"
    if not (folder / "problems.json").is_file():
        pytest.skip(f"no ScienceQA at {folder}")
    overrides = {"adem.evaluation_splits": ["val", "test"], "adem.epochs": 0.05, "adem.warmup_epochs": 0.0}
    own = load_profile("tiny", overrides).adem
    assert (own.max_tokens, own.language_model) == (1024, "tiny/science_llama")
    whole = load_problems(own, tmp_path / "unused", folder)
    assert len(whole.problems) == 1773 and whole.rejects.empty
    train = whole.problems[whole.problems["split"] == "train"]
    asked = whole.problems[whole.problems["split"] != "train"].reset_index(drop=True)
    model = build_model(own)
    result, skipped = train_adem(model, train, own, tmp_path / "run", progress=False)
    assert result.status == "complete" and skipped.empty
    joined = answering.join_predictions(asked, train, {"": answering.predict(model, asked, own)})
    scored = tables.scores(joined)
    assert len(train) + scored[""]["total"] == 1773 and tables.too_long(joined).empty
    assert scored[""]["missing"] == 0 and joined["scores"].map(len).tolist() == asked["choices"].map(len).tolist()
    official = joined[joined["pid"].isin(asked.loc[asked["split"] == "test", "pid"])]
    assert tables.scores(official)["first_choice"]["accuracy"] == 40.72  # 147 of this slice's 361
    assert all(name in scored[""] for name in ("NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12"))
