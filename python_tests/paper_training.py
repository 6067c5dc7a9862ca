# SPDX-License-Identifier: Apache-2.0
"""A tiny backbone and pairs for the tests that train the compared systems."""

import torch
from transformers import AutoTokenizer

import dualhead_ext as dh
from dualhead_ext.data.collate import PreferenceCollator, tokenize_pairs
from dualhead_ext.eval.paper.pretraining import make_model, write_backbone
from dualhead_ext.eval.paper.settings import BackboneSpec

TINY = BackboneSpec(hidden_size=32, layers=2, heads=2, intermediate=48, context=32)
WORDS = "Tea Bread Rain Music Maths Gardens Trains Cats Snow Chess Ships Stars".split()
# Chosen and rejected responses share no word and are equally long, so that they are easy to rank.
PAIRS = [
    {
        "prompt": f"\n\nHuman: {word}?\n\nAssistant:",
        "chosen": " good" * (2 + i % 3),
        "rejected": " bad" * (2 + i % 3),
    }
    for i, word in enumerate(WORDS)
]
FAST = {"batch_size": 4, "max_length": 48, "logging_steps": 1, "learning_rate": 1e-2}


def save_backbone(folder, seed=0):
    """Save a tiny Llama with the built-in tokenizer and weights that have an effect."""
    tokenizer = AutoTokenizer.from_pretrained(dh.data.embedded_backbone_path())
    torch.manual_seed(seed)
    model = make_model(TINY, tokenizer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    write_backbone(model, tokenizer, {}, folder)
    return folder


def batch_of(pairs, tokenizer):
    collate = PreferenceCollator(tokenizer.pad_token_id)
    return collate(tokenize_pairs(pairs, tokenizer, FAST["max_length"]))


@torch.no_grad()
def response_logps(model, pairs, tokenizer):
    """(sum, length) of the response of each text, one text at a time. Chosen texts come first."""
    sums, lengths = [], []
    for side in ("chosen", "rejected"):
        for row in tokenize_pairs(pairs, tokenizer, FAST["max_length"]):
            ids, mask = row[f"{side}_input_ids"], row[f"{side}_completion_mask"]
            logits = model(torch.tensor([ids])).logits[0]
            logps = torch.log_softmax(logits.to(model.dtype), -1)
            terms = [logps[t - 1, ids[t]] for t in range(1, len(ids)) if mask[t]]
            sums.append(sum(terms))
            lengths.append(len(terms))
    return torch.stack(sums), torch.tensor(lengths)
