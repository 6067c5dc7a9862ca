# SPDX-License-Identifier: Apache-2.0
"""Coherence by a tiny sentence embedder and by a backbone's hidden states, text by text."""

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertModel

import dualhead_ext as dh
from dualhead_ext.eval import coherence

TEXTS = ["How do I bake bread?", "Mix flour and water.", "", "a " * 60]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(dh.data.embedded_backbone_path())


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A random BERT that takes at most 40 tokens, saved with a tokenizer."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=40,
    )
    path = tmp_path_factory.mktemp("bert")
    BertModel(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def alone(model, tokenizer, text, longest):
    """The mean state of one text, unpadded."""
    ids = tokenizer(text or " ")["input_ids"][:longest]
    with torch.no_grad():
        return model(torch.tensor([ids]))[0][0].mean(0)


def test_a_sentence_embedder_pools_real_tokens(folder, tokenizer):
    embedder = coherence.sentence_embedder(folder, batch_size=3)
    model = BertModel.from_pretrained(folder).eval()
    expected = torch.stack([alone(model, tokenizer, text, 40) for text in TEXTS])
    torch.testing.assert_close(embedder.embed(TEXTS), expected, rtol=1e-4, atol=1e-5)
    assert embedder.name == f"{folder} (mean pooling)"


def test_the_backbones_states_are_named_so(tokenizer):
    path = str(dh.data.embedded_backbone_path())
    model = dh.DualHeadForCausalLM.from_backbone(
        path, dtype=torch.float32, reward_head="full", gate="attention"
    )
    embedder = coherence.backbone_embedder(model, tokenizer, batch_size=2)
    expected = torch.stack([alone(model.get_decoder(), tokenizer, text, 256) for text in TEXTS])
    torch.testing.assert_close(embedder.embed(TEXTS), expected, rtol=1e-4, atol=1e-5)
    assert embedder.name.startswith("mean hidden state of ") and path in embedder.name


def test_coherence_is_the_mean_cosine():
    table = {"a": [1.0, 0.0], "b": [1.0, 1.0], "c": [0.0, 2.0]}
    embedder = coherence.Embedder("table", lambda texts: torch.tensor([table[t] for t in texts]))
    got = coherence.coherence(embedder, ["a", "a", "b"], ["b", "c", "b"])
    assert got.value == pytest.approx((0.5**0.5 + 0 + 1) / 3)
    assert 0 <= got.low < got.value < got.high <= 1 + 1e-6
    for prompts, responses in (([], []), (["a"], [])):
        with pytest.raises(ValueError, match="must have one length and not be empty"):
            coherence.coherence(embedder, prompts, responses)
