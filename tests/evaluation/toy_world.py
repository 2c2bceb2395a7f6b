"""A world of four tokens in which every value can be worked out by hand: a bigram model and a few rows.

The hidden state of a position is the one-hot vector of its token, and the head is the only parameter, so the logits behind
token x are ``BIGRAMS[x]``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from eua.data.rows import EncodedRow

BIGRAMS = torch.tensor([[0.0, 1, 2, 3], [1, 0, -1, 2], [2, 2, 0, 1], [-1, 3, 1, 0]])  # A, of the model
REFERENCE_BIGRAMS = torch.tensor([[1.0, 0, 0, 2], [0, 1, 1, 0], [2, 0, 1, 1], [0, 2, 2, -1]])  # B, of the reference
MEASURED = [EncodedRow([1, 2, 3, 0, 2], 2), EncodedRow([3, 1, 0], 1), EncodedRow([1, 3, 1, 2, 0, 3], 2)]  # M


class BigramConfig(PretrainedConfig):
    model_type = "bigrams"


class BigramModel(PreTrainedModel, GenerationMixin):
    """A causal language model whose logits depend on the last token only; its one parameter is ``bigrams``, transposed."""

    config_class = BigramConfig

    def __init__(self, bigrams: Tensor = BIGRAMS) -> None:
        super().__init__(BigramConfig(vocab_size=len(bigrams), num_hidden_layers=0))
        self.head = nn.Linear(*bigrams.shape, bias=False)
        self.head.weight = nn.Parameter(bigrams.T.clone())
        self.eval()

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=self.head(nn.functional.one_hot(input_ids, len(self.head.weight)).to(self.dtype)))


class Letters:
    """As much of a tokenizer as decodes the four tokens: a, b, c, d."""

    def batch_decode(self, rows: list[list[int]], skip_special_tokens: bool) -> list[str]:
        return ["".join("abcd"[token] for token in row) for row in rows]
