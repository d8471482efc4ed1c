"""The table of captions: what is read is what was written, and no other table is taken for one."""

import pandas as pd
import pyarrow.parquet as pq
import pytest

from helpers.store.tables import StoreError, read_captions, write_captions

ROWS = [
    {"caption_id": "b-2", "gif_sha256": "bb", "split": "test", "caption": "a cat 'sits'", "facts": []},
    {"caption_id": "a-1", "gif_sha256": "aa", "split": "train", "caption": "ein Hund läuft", "facts": ["x=1", "y<z"]},
]


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1], []])
def test_captions_come_back_sorted_with_lists_of_facts(tmp_path, rows):
    path = tmp_path / "captions.parquet"
    write_captions(pd.DataFrame(rows, columns=list(ROWS[0])), path)
    assert read_captions(path).to_dict("records") == sorted(rows, key=lambda row: row["caption_id"])
    assert pq.read_schema(path).names == list(ROWS[0])


def test_a_run_of_an_earlier_version_has_no_captions(tmp_path):
    captions = read_captions(tmp_path / "captions.parquet")
    assert captions.empty and list(captions.columns) == list(ROWS[0])


@pytest.mark.parametrize(
    ("table", "told"),
    [
        (pd.DataFrame(ROWS).drop(columns="facts"), "not .*facts"),
        (pd.DataFrame(ROWS).assign(facts="x=1"), "facts .*string, not"),
        (pd.DataFrame(ROWS).assign(caption=[1, 2]), "caption int64"),
        (pd.DataFrame(ROWS).assign(lang="en"), "lang"),
    ],
)
def test_another_table_is_refused_by_its_columns(tmp_path, table, told):
    table.to_parquet(tmp_path / "captions.parquet")
    with pytest.raises(StoreError, match=rf"captions\.parquet is no table of captions.*{told}.*--force"):
        read_captions(tmp_path / "captions.parquet")


def test_a_damaged_table_is_named(tmp_path):
    path = tmp_path / "captions.parquet"
    write_captions(pd.DataFrame(ROWS), path)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(StoreError, match=r"captions\.parquet cannot be read as a table.*--force"):
        read_captions(path)
