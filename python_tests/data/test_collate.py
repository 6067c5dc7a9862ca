# SPDX-License-Identifier: Apache-2.0
"""Tokens, masks and batches of preference pairs.

The tokenizers are the embedded one, and others that behave differently.
"""

import pytest
from transformers import AutoTokenizer

import dualhead_ext as dh
from dualhead_ext.data import ASSISTANT, HUMAN, load_preference_data
from dualhead_ext.data.collate import PreferenceCollator, encode, tokenize_pairs
from dualhead_ext.data.rendering import dialogue_spans

PROMPT = f"{HUMAN} How are you?{ASSISTANT}"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(dh.data.embedded_backbone_path())


def said(coded, tokenizer):
    """The text that the mask selects."""
    pairs = zip(coded["input_ids"], coded["completion_mask"], strict=True)
    return tokenizer.decode([token for token, on in pairs if on])


def test_the_mask_is_the_response_and_the_end(tokenizer):
    coded = encode(PROMPT, " I\u2019m fine 😀.", tokenizer, 100)
    assert said(coded, tokenizer) == " I\u2019m fine 😀.<|eos|>"
    assert coded["input_ids"][0] == tokenizer.bos_token_id
    assert coded["input_ids"].count(tokenizer.bos_token_id) == 1
    assert coded["input_ids"].count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(coded["input_ids"][1:-1]) == PROMPT + " I\u2019m fine 😀."


def test_role_markers_and_human_turns_inside_a_response_are_not_said(tokenizer):
    response = f" Yes.{HUMAN} Really?{ASSISTANT} No."
    assert said(encode(PROMPT, response, tokenizer, 100), tokenizer) == " Yes. No.<|eos|>"
    assert dialogue_spans(" plain") == [(0, 6)]
    assert dialogue_spans(f"{HUMAN} x") == []


def test_a_token_that_straddles_the_seam_belongs_to_the_response(tokenizer):
    coded = encode("ab", "c", tokenizer, 100)
    whole = tokenizer("abc", add_special_tokens=False)["input_ids"]
    # The tokens are those of the whole text, as a decoder would read it
    assert coded["input_ids"][1:-1] == whole
    assert coded["completion_mask"][len(whole)] == 1


@pytest.mark.parametrize("max_length", range(2, 24))
def test_truncation_keeps_the_responses_start(tokenizer, max_length):
    whole = encode(PROMPT, " one two three four", tokenizer, 1000)
    cut = encode(PROMPT, " one two three four", tokenizer, max_length)
    assert len(cut["input_ids"]) == min(max_length, len(whole["input_ids"]))
    assert cut["truncated"] == (max_length < len(whole["input_ids"]))
    assert cut["input_ids"][0] == tokenizer.bos_token_id
    responses = [
        [t for t, on in zip(c["input_ids"], c["completion_mask"], strict=True) if on]
        for c in (whole, cut)
    ]
    assert responses[0][: len(responses[1])] == responses[1] and responses[1]


def test_truncation_is_counted(tokenizer, caplog):
    rows = [{"prompt": PROMPT, "chosen": " yes" * 40, "rejected": " no"}]
    tokenize_pairs(rows, tokenizer, max_length=30)
    assert "1 of 2 texts were longer than max_length = 30" in caplog.text
    with pytest.raises(ValueError, match="max_length must be at least 2"):
        tokenize_pairs(rows, tokenizer, max_length=1)
    with pytest.raises(ValueError, match="must be a fast one"):
        tokenize_pairs(rows, object())


def test_batches_are_all_chosen_then_all_rejected(tokenizer):
    rows = load_preference_data("embedded")[:5]
    pairs = tokenize_pairs(rows, tokenizer, 128)
    batch = PreferenceCollator(tokenizer.pad_token_id, pad_to_multiple_of=8)(pairs)
    assert batch["input_ids"].shape == batch["completion_mask"].shape
    assert batch["input_ids"].shape[1] % 8 == 0 and batch["objective"].tolist() == [0] * 5
    for n, side in enumerate(("chosen", "rejected")):
        for i, pair in enumerate(pairs):
            row, length = n * 5 + i, len(pair[f"{side}_input_ids"])
            assert batch["input_ids"][row, :length].tolist() == pair[f"{side}_input_ids"]
            assert batch["attention_mask"][row].sum() == length
            assert batch["completion_mask"][row].sum() == sum(pair[f"{side}_completion_mask"])
            assert (batch["input_ids"][row, length:] == tokenizer.pad_token_id).all()


def test_trls_columns():
    rows = [{"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5], "objective": 2}]
    batch = PreferenceCollator(0)(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 0], [1, 2, 4, 5]]
    assert batch["completion_mask"].tolist() == [[0, 0, 1, 0], [0, 0, 1, 1]]
    assert batch["objective"].tolist() == [2]


def test_the_docstrings_example():
    import doctest

    from dualhead_ext.data import collate

    assert doctest.testmod(collate).attempted > 0 and doctest.testmod(collate).failed == 0
