"""Cases of the simulation of sums; `test_endless_sums.py` runs them in a process of their own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.endless_sums import Block, Run, simulate
from lola_vllm.core.ops.dither import add_dithered, dither

LENGTH, SIZE = 256, 64


def block(seed: int) -> Block:
    rng = np.random.default_rng(seed)
    phi = rng.dirichlet(np.ones(8), size=(SIZE, 2)).reshape(SIZE, 16)  # each half sums to 1
    v = rng.normal(size=(SIZE, 3)) + rng.normal(size=3)
    return Block(phi.astype(np.float32), v.astype(np.float32))


@pytest.mark.parametrize("interval", [1, 16])
def test_a_run_folds_as_the_ops_do(interval: int) -> None:
    run, text = Run(block(0), LENGTH, SIZE, interval, True, dithered=True), block(0)
    run.feed(text, 7)
    H, exact = torch.zeros(16, 4), torch.zeros(16, 4, dtype=torch.float64)
    folds = torch.from_numpy(text.folds(interval))
    for n in range(7):
        if n * SIZE >= LENGTH:
            H, exact = H * 0.75, exact * 0.75
        for u, added in enumerate(folds):
            number = torch.tensor([(n * SIZE) // interval + u + 1])
            # The first block, with which a state begins, is short of rounding.
            turn = dither(number, 16)[0][:, None] if n else torch.zeros(16, 1)
            H = add_dithered(H, added, turn)
            exact = exact + added.double()
    assert np.array_equal(run.sums, H.numpy())
    np.testing.assert_allclose(run.exact, exact.numpy(), rtol=1e-12)


def test_the_mass_of_a_shifted_state_is_that_of_the_trained_length() -> None:
    text = block(0)
    run = Run(text, LENGTH, SIZE, 16, True, dithered=True)
    for n in range(1, 200):
        run.feed(text, 1)
        sample = run.sample(text)
        assert sample.mass <= LENGTH * (1 + 1e-5)
        assert n < 4 or sample.mass >= (LENGTH - SIZE) * (1 - 1e-5)
    decay = 0.75
    assert sample.newest == pytest.approx((1 - decay**4), rel=1e-6)
    assert sample.error < 1e-5 and abs(sample.mass_error) < 1e-5


def test_only_a_shifted_state_follows_another_text() -> None:
    rows = [
        simulate(block(0), block(1), LENGTH, SIZE, 20_000, 16, shifted, dithered=True)
        for shifted in (True, False)
    ]
    assert [s["tokens"] for s in rows[0]["samples"]] == [256, 9984, 19968]
    away = [[row["relative"] for row in found["away_from_the_new_text"]] for found in rows]
    assert away[0][0] == pytest.approx(away[1][0], rel=1e-3) and away[0][0] > 0.1
    assert away[0][-1] < 0.05 * away[0][0] < 0.5 * away[0][0] < away[1][-1]
    assert rows[1]["samples"][-1]["mass"] == pytest.approx(19968, rel=1e-4)
