"""The memorised share against the losses: one of the runs again, and what the guide says of them."""

import memorised
import pandas as pd
import pytest


def test_the_logged_share_is_the_measured_one() -> None:
    stored = pd.read_csv(memorised.RESULTS)
    again = pd.DataFrame(memorised.train("hard", epochs=2))
    assert list(again) == list(stored)
    before = stored[stored["gate"] == "hard"].head(2)
    for name in ("training_loss", "test_loss", "logged", "measured"):
        assert again[name].tolist() == pytest.approx(before[name].tolist(), rel=1e-2)
    assert (stored["logged"] - stored["measured"]).abs().max() < 0.11
    adamw = stored[stored["gate"] == "none"]
    lowest = adamw["test_loss"].argmin()
    assert adamw["logged"].iloc[lowest] == pytest.approx(1, abs=0.1)
    assert adamw["logged"].iloc[0] < 0.5
