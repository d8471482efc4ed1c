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
    level = {"now": 100.0, "peak": 5000.0}  # the peak of something earlier
    called = []

    def reset():
        called.append("reset")
        level["peak"] = level["now"]

    def step():
        called.append("step")
        level.update(now=300.0, peak=900.0)  # what the step leaves behind, and what it needed on its way

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: called.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: level["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: level["peak"])
    monkeypatch.setattr(step_cost.time, "perf_counter", lambda: called.append("clock") or 7.0 * len(called))
    assert step_cost.peak_bytes(step) == 800
    assert called == ["synchronize", "reset", "step", "synchronize"]
    called.clear()
    assert step_cost.seconds(lambda: called.append("step")) == 7.0 * (5 - 2)
    assert called == ["synchronize", "clock", "step", "synchronize", "clock"]  # the clock waits for the GPU


def test_kept_bytes_are_those_of_the_tensors_that_the_backward_pass_needs():
    """exp keeps its result, a product its factors; a weight is there in any case, and a storage counts once."""
    weight, inputs = torch.randn(4, 6, requires_grad=True), torch.randn(8, 4)

    def forward():
        return (inputs @ weight).exp().square().sum()

    assert step_cost.kept_bytes(forward, [weight]) == 4 * (8 * 4 + 8 * 6)
    assert step_cost.kept_bytes(forward, [weight, inputs]) == 4 * 8 * 6
    inputs.requires_grad_()  # now the weight is needed as well
    assert step_cost.kept_bytes(forward, [weight]) == 4 * (8 * 4 + 8 * 6)
    assert step_cost.kept_bytes(forward, []) == 4 * (8 * 4 + 8 * 6 + 4 * 6)
