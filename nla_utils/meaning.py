"""What a text shares with its source: tokens, the last token, and the meaning that a sentence model sees."""

from __future__ import annotations

from typing import Sequence

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from nla_utils.sources import fetch_sentence_model

SENTENCE_BATCH = 64


def token_overlap(text: Sequence[int], source: Sequence[int]) -> float:
    """Share of a text's tokens that occur among as many last tokens of the source, each counted once."""
    tail = list(source[-len(text) :])
    hits = 0
    for token in text:
        if token in tail:
            tail.remove(token)
            hits += 1
    return hits / len(text)


@torch.inference_mode()
def sentence_embeddings(texts: Sequence[str]) -> np.ndarray:
    """Unit embeddings (N, 384) of texts by all-MiniLM-L6-v2: mean over tokens, padding aside."""
    folder = fetch_sentence_model()
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    parts = []
    for first in range(0, len(texts), SENTENCE_BATCH):
        batch = list(texts[first : first + SENTENCE_BATCH])
        inputs = tokenizer(batch, padding=True, truncation=True, max_length=128, return_tensors="pt")
        hidden_BTd = model(**inputs).last_hidden_state
        mask_BT1 = inputs["attention_mask"][:, :, None].float()
        parts.append((hidden_BTd * mask_BT1).sum(1) / mask_BT1.sum(1))
    return torch.nn.functional.normalize(torch.cat(parts), dim=1).numpy()
