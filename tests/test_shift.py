"""The one shift, where only the last tokens are asked about."""

import pytest
import torch

from rlhf_fn.logprobs import token_logprobs
from rlhf_fn.models import on_next_token

TOKENS, LOGITS = torch.randint(11, (4, 6)), torch.randn(4, 6, 11, dtype=torch.float64)


@pytest.mark.parametrize("last", range(1, 7))
def test_the_last_tokens_alone_are_aligned_as_they_are_among_all(last):
    looked_at = []
    aligned = on_next_token(lambda z, y: looked_at.append(z.shape[1]) or token_logprobs(z, y))
    whole, asked = aligned(LOGITS, TOKENS), aligned(LOGITS, TOKENS[:, -last:])
    torch.testing.assert_close(asked, whole[:, -last:], rtol=0, atol=0)
    assert looked_at == [5, min(last, 5)]


def test_more_tokens_than_logits_are_refused():
    with pytest.raises(ValueError, match="tokens"):
        on_next_token(token_logprobs)(LOGITS[:, 1:], TOKENS)
