"""The comparison of training steps: what is counted, and on which device."""

import torch

from helpers.sweeps import step_cost


def test_a_step_of_both_ways_in_their_own_shapes():
    table, shapes = step_cost.step_cost(hidden=32, blocks=2, rows=1, text=12, rounds=2, device=torch.device("cpu"))
    assert table.index.tolist() == ["lora", "adem"]
    assert table.columns.tolist() == ["milliseconds", "MB kept for the backward pass", "trained", "rounds"]
    assert all(len(rounds) == 2 for rounds in table["rounds"])
    # LoRA of rank 8 on two 32 x 32 matrices of 2 blocks, and a projector of 128 x 128 and 128 x 32 with biases
    assert table.loc["lora", "trained"] == 2 * 2 * 2 * 8 * 32 + 128 * 128 + 128 + 128 * 32 + 32
    for part in ("2 x 32", "1 x 12 text tokens", "256 image tokens", "320 visual positions", "cpu"):
        assert part in shapes


def test_the_gpus_own_meter_and_clock_are_used_on_a_gpu(monkeypatch):
    """Without a GPU: CUDA's counters are stood in for, and the batch says that it is there."""
    level = {"now": 100.0, "peak": 900.0}
    called = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: called.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: called.append("reset"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: level["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: level["peak"])
    assert step_cost.peak_bytes(lambda: called.append("step")) == 800
    assert called == ["synchronize", "reset", "step", "synchronize"]
    called.clear()
    step_cost.seconds(lambda: called.append("step"))
    assert called == ["synchronize", "step", "synchronize"]
