"""A BERT that learns something within minutes on a laptop: its tokenizer, its size, and weights that help it to start.

The quickstart needs it, the method does not. From random weights a BERT takes far longer to find out which tokens are
neighbours: in 2,000 steps this one learned little beyond how often single tokens occur (docs/decisions.md). So it
starts with sinusoidal positions, and with attention heads that look at neighbouring tokens.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerBase

from supershaper_hf import train_tokenizer


TEXT = Path(__file__).parent / "data" / "presidential_addresses.txt"
LENGTH = 32  # tokens of the longest sequence


def make_tokenizer(documents: Iterable[str]) -> PreTrainedTokenizerBase:
    """Train a tokenizer of 1,000 tokens on `documents`."""
    return train_tokenizer(documents, vocab_size=1000, max_length=LENGTH)


def make_bert(tokenizer: PreTrainedTokenizerBase) -> BertForMaskedLM:
    """Return a BERT of 6 layers for the tokens of `tokenizer`. It is not trained yet."""
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=LENGTH,
        initializer_range=0.05,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    bert = BertForMaskedLM(config)
    look_at_neighbours(bert)
    return bert


@torch.no_grad()
def look_at_neighbours(bert: BertForMaskedLM, layers: int = 2, sharpness: float = 2.0) -> None:
    """Set sinusoidal positions, and let the heads of the first layers look 1 or 2 tokens to the left or right.

    A position is a list of points on circles, one pair of sine and cosine for each angle. Moving by `offset` tokens
    turns every pair by a fixed angle, so one matrix maps the position of every token to that of its neighbour. A head
    whose query is this matrix, and whose key is the identity, attends to that neighbour.

    Args:
        bert: A BERT with 4 attention heads. It is changed in place.
        layers: The number of layers whose heads are set.
        sharpness: Factor of the query and the key matrices. With a larger one, attention to the neighbour is sharper.
    """
    embeddings = bert.bert.embeddings.position_embeddings.weight
    length, width = embeddings.shape
    angles = torch.arange(length).unsqueeze(1) * 2.5 * 0.85 ** torch.arange(width // 2)
    positions = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)
    embeddings.copy_(0.1 * positions)
    head_size = width // bert.config.num_attention_heads
    for head, offset in enumerate((-1, 1, -2, 2)):
        sine, cosine = (offset * angles[1]).sin(), (offset * angles[1]).cos()
        turns = torch.stack([torch.stack([cosine, sine], -1), torch.stack([-sine, cosine], -1)], dim=-1)
        shift = torch.block_diag(*turns)  # positions[i] @ shift == positions[i + offset]
        rows = slice(head * head_size, (head + 1) * head_size)
        for layer in bert.bert.encoder.layer[:layers]:
            layer.get_parameter("attention.self.query.weight")[rows] = sharpness * shift.T[:head_size]
            layer.get_parameter("attention.self.key.weight")[rows] = sharpness * torch.eye(width)[:head_size]
