"""The ids of a batch's lines, and what its states mean."""

from __future__ import annotations

import pytest

from lbr.core.batches import PARKED, BatchState, custom_id, new_nonce, read_custom_id
from lbr.core.types import JobId

MAX_ID = 2**63 - 1


def test_an_id_holds_batch_job_and_fence() -> None:
    """What is read is what was written; the longest id keeps within the 64 characters that providers take."""
    nonce = new_nonce()
    text = custom_id(nonce, JobId(MAX_ID), 2**31)
    assert len(text) <= 64
    assert read_custom_id(text) == (nonce, MAX_ID, 2**31)
    assert new_nonce() != nonce


@pytest.mark.parametrize("text", ["", "line-7", "abcdef012345-7", "abcdef012345-7-1\n", "ABCDEF012345-7-1", "x" * 99])
def test_other_ids_are_not_ours(text: str) -> None:
    """An id that lbr did not make is no error."""
    assert read_custom_id(text) is None


def test_a_parked_job_is_parked_until_its_batch_has_ended() -> None:
    """Before the intent the provider cannot have a batch; the sentinel fits both databases."""
    assert [state for state in BatchState if not state.is_open] == [BatchState.SETTLED, BatchState.RELEASED]
    assert [state for state in BatchState if state.is_open and not state.may_be_out] == ["planned", "uploaded"]
    assert 2**53 < PARKED < 2**63
