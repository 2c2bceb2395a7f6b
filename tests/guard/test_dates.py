"""A guard decides on every day as on the day of its calibration, although the chat template writes the date."""

from __future__ import annotations

from datetime import datetime

import torch

from eua import EnergyGuard
from eua.data.batches import pad_prompts
from eua.data.rows import encode_prompts
from tests.data.test_dates import CHAT, DATED, clock, with_template  # noqa: F401


def test_scores_do_not_change_with_the_day(known, tokenizer, questions, clock):  # noqa: F811
    dated = with_template(tokenizer, DATED + CHAT)
    guard = EnergyGuard.calibrate(known, dated, questions, tolerance=0.2)
    before = guard.score(known, dated, questions)
    clock.moment = datetime(2026, 12, 31)
    torch.testing.assert_close(guard.score(known, dated, questions), before)
    with guard.attach(known) as handle:
        ids = encode_prompts(questions, dated)
        known.generate(**pad_prompts(ids, tokenizer.pad_token_id, known.device), max_new_tokens=1, pad_token_id=2)
        torch.testing.assert_close(handle.scores, before)
