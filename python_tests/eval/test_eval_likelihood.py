# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities and figures based on them, against loops over one unpadded text at a time."""

import math

import pytest
import torch
from tiny_models import VOCAB, make_backbone, make_model
from transformers import AutoTokenizer

import dualhead_ext as dh
from dualhead_ext.eval import likelihood
from dualhead_ext.eval.likelihood import Text, of_genarm, of_model, of_reward_head


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(dh.data.embedded_backbone_path())


@pytest.fixture
def embedded():
    model = dh.DualHeadForCausalLM.from_backbone(
        str(dh.data.embedded_backbone_path()),
        dtype=torch.float32,
        reward_head="full",
        gate="attention",
    )
    with torch.no_grad():
        for parameter in (
            *model.lm_head.reward_head.parameters(),
            *model.lm_head.gate.parameters(),
        ):
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def random_texts(seed, lengths=(9, 3, 14, 2, 6)):
    generator = torch.Generator().manual_seed(seed)
    texts = []
    for length in lengths:
        ids = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        response = torch.randint(0, 2, (length,), generator=generator).tolist()
        texts.append(Text(ids, [*response[:-1], 1]))
    return texts


def systems(family):
    """{name: (Distribution, a slow function of one text (1, T) by the model's own logits)}."""
    base, arm = make_backbone(family), make_backbone(family, seed=7)
    gated = make_model(family, mix="probs", num_objectives=2)
    weights = torch.tensor([0.3, 0.9])

    def log_probs(model, ids, **controls):
        return torch.log_softmax(model(ids, **controls).logits.double(), -1)

    def product(ids):
        total = (log_probs(base, ids) + 0.7 * log_probs(arm, ids)) / 1.7
        return total - total.exp().sum(-1, keepdim=True).log()

    def reward_head(ids):  # z_RM of objective 1, from the head's own weight
        hidden = gated.get_decoder()(input_ids=ids, use_cache=False)[0]
        head = gated.lm_head_module.reward_head
        logits = hidden @ head.weight[1].T + (0.0 if head.bias is None else head.bias[1])
        config = gated.dual_head_config
        return torch.log_softmax(
            dh.reference.postprocess(logits, config.logit_scale, config.logit_softcap).double(), -1
        )

    controls = {"strength": 0.6, "gate_offset": 0.2, "objective_weights": weights}
    return {
        "plain": (of_model(base), lambda ids: log_probs(base, ids)),
        "gated": (of_model(gated, **controls), lambda ids: log_probs(gated, ids, **controls)),
        "pi_LM": (of_model(gated, strength=0.0), lambda ids: log_probs(base, ids)),
        "pi_r": (of_reward_head(gated, 1), reward_head),
        "genarm": (of_genarm(base, [arm], [0.7], temperature=1.7), product),
    }


@torch.no_grad()
def slow_rows(slow, text):
    """Log-probabilities (n, V) at the positions before each response token of a single text."""
    found = slow(torch.tensor([text.ids]))[0]
    return torch.stack([found[t - 1] for t in range(1, len(text.ids)) if text.response[t]])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2-softcap"])
@pytest.mark.parametrize("name", ["plain", "gated", "pi_LM", "pi_r", "genarm"])
def test_token_log_probs_equal_one_text_at_a_time(name, family, side, seed):
    print("seed", seed)
    texts = random_texts(seed)
    system, slow = systems(family)[name]
    found = likelihood.token_log_probs(system, texts, batch_size=3, padding_side=side)
    for text, values in zip(texts, found, strict=True):
        targets = [t for t, r in zip(text.ids[1:], text.response[1:], strict=True) if r]
        expected = slow_rows(slow, text)[torch.arange(len(targets)), targets]
        # Padded and unpadded logits in fp32 round differently. The tolerance allows for that
        # rounding.
        torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["gated", "pi_r", "genarm"])
def test_kl_is_its_definition(name, side, seed):
    texts = random_texts(seed)
    table = systems("llama")
    (system, slow), (reference, slow_reference) = table[name], table["plain"]
    found = likelihood.token_kl(system, reference, texts, batch_size=2, padding_side=side)
    for text, values in zip(texts, found, strict=True):
        rows = zip(slow_rows(slow, text), slow_rows(slow_reference, text), strict=True)
        for value, (p, q) in zip(values, rows, strict=True):
            kl = sum(math.exp(p[v]) * (float(p[v]) - float(q[v])) for v in range(VOCAB))
            assert float(value) == pytest.approx(kl, rel=1e-3, abs=1e-5) and kl > 0
    same = likelihood.token_kl(reference, table["pi_LM"][0], texts)
    assert max(float(v.abs().max()) for v in same) < 1e-5


def test_kl_of_a_token_that_cannot_come_is_finite():
    p = torch.tensor([0.0, -torch.inf]).expand(1, 3, 2)
    q = torch.log(torch.tensor([0.25, 0.75])).expand(1, 3, 2)
    one, two = (likelihood.Distribution(lambda i, m, x=x: x, torch.device("cpu")) for x in (p, q))
    (kl,) = likelihood.token_kl(one, two, [Text([1, 1, 1], [0, 0, 1])])
    assert float(kl) == pytest.approx(math.log(4))
    (kl,) = likelihood.token_kl(two, one, [Text([1, 1, 1], [0, 0, 1])])
    assert float(kl) == math.inf


def test_perplexity_and_token_mean():
    values = [torch.log(torch.tensor(row)).double() for row in ([0.5, 0.25], [0.125])]
    assert likelihood.perplexity(values).value == pytest.approx(64 ** (1 / 3))
    mean = likelihood.token_mean(values)
    assert mean.value == pytest.approx(-math.log(64) / 3)
    # There are two texts: a resample holds one of them twice, the other twice, or both.
    assert (mean.low, mean.high) == pytest.approx((-math.log(8), -math.log(8) / 2))
    high = likelihood.perplexity(values)
    assert (high.low, high.high) == pytest.approx((8**0.5, 8))


def test_texts_are_tokenised_as_in_training(tokenizer):
    row = dh.data.load_preference_data("embedded", "test")[0]
    from dualhead_ext.data.collate import tokenize_pairs

    (expected,) = tokenize_pairs([row], tokenizer)
    (text,) = likelihood.make_texts([(row["prompt"], row["chosen"])], tokenizer)
    assert text.ids == expected["chosen_input_ids"]
    assert text.response == expected["chosen_completion_mask"]
    (bare,) = likelihood.make_texts([(row["prompt"], row["chosen"])], tokenizer, end=False)
    assert [*bare.ids, tokenizer.eos_token_id] == text.ids and sum(bare.response) > 0
    with pytest.raises(ValueError, match="response 0 must have a token"):
        likelihood.make_texts([("a", "")], tokenizer, end=False)


def test_cut_texts_are_said(tokenizer, caplog):
    likelihood.make_texts([("a", " b"), ("a", " b" * 40)], tokenizer, max_length=16)
    assert "1 of 2 texts were longer than max_length = 16" in caplog.text


def test_pair_accuracy_equals_a_loop(embedded, tokenizer):
    rows = dh.data.load_preference_data("embedded", "test")[:8]
    rows.append(dict(rows[0], rejected=rows[0]["chosen"]))  # a tie
    system = of_reward_head(embedded)
    got = likelihood.pair_accuracy(system, rows, tokenizer, max_length=48, batch_size=5)

    def score(prompt, response):
        (text,) = likelihood.make_texts([(prompt, response)], tokenizer, 48)
        with torch.no_grad():
            hidden = embedded.get_decoder()(torch.tensor([text.ids]), use_cache=False)[0]
            logits = hidden @ embedded.lm_head.reward_head.weight[0].T
        found = torch.log_softmax(logits[0].double(), -1)
        return sum(
            float(found[t - 1, text.ids[t]]) for t in range(1, len(text.ids)) if text.response[t]
        )

    wins = sum(
        score(row["prompt"], row["chosen"]) > score(row["prompt"], row["rejected"])
        for row in rows[:-1]
    )
    assert got.pairs == 9 and got.accuracy.value == pytest.approx((wins + 0.5) / 9)
    assert 0 < wins < 8 and got.accuracy.low < got.accuracy.value < got.accuracy.high
    longer = sum(len(row["chosen"]) > len(row["rejected"]) for row in rows[:-1]) + 0.5
    assert got.longer.value == pytest.approx(longer / 9)


def test_the_mixture_is_scored_too(embedded, tokenizer):
    rows = dh.data.load_preference_data("embedded", "test")[:6]
    texts = likelihood.make_texts([(r["prompt"], r["chosen"]) for r in rows], tokenizer, 48)
    sums = {}
    for name, system in (
        ("mix", of_model(embedded)),
        ("lm", of_model(embedded, strength=0.0)),
        ("r", of_reward_head(embedded)),
    ):
        sums[name] = [float(v.sum()) for v in likelihood.token_log_probs(system, texts)]
    assert sums["mix"] != sums["lm"] and sums["mix"] != sums["r"]


def test_truthfulqa_equals_a_loop(embedded, tokenizer):
    questions = [
        {"prompt": "\n\nHuman: Who?\n\nAssistant:", "best": "Nobody", "correct": ("No", "Nobody")},
        {"prompt": "\n\nHuman: Is it?\n\nAssistant:", "best": "Yes", "correct": ("Yes",)},
        {"prompt": "\n\nHuman: Why?\n\nAssistant:", "best": "I do not", "correct": ("I do not",)},
    ]
    for row, wrong in zip(questions, (("You", "xylophone zq"), ("I",), ("zqx vbn",)), strict=True):
        row["incorrect"] = wrong
    got = likelihood.truthfulqa(of_model(embedded), questions, tokenizer, batch_size=2)

    def probability(prompt, answer):
        start = tokenizer(prompt)["input_ids"]
        ids = tokenizer(f"{prompt} {answer}")["input_ids"]
        assert ids[: len(start)] == start
        with torch.no_grad():
            found = torch.log_softmax(embedded(torch.tensor([ids])).logits[0].double(), -1)
        return math.exp(sum(float(found[t - 1, ids[t]]) for t in range(len(start), len(ids))))

    mc1, mc2 = [], []
    for row in questions:
        right = {a: probability(row["prompt"], a) for a in row["correct"]}
        wrong = [probability(row["prompt"], a) for a in row["incorrect"]]
        mc1.append(right[row["best"]] > max(wrong))
        total = sum(right.values())
        mc2.append(total / (total + sum(wrong)))
    assert got.questions == 3 and 0 < sum(mc1) < 3
    assert got.mc1.value == pytest.approx(sum(mc1) / 3)
    assert got.mc2.value == pytest.approx(sum(mc2) / 3, rel=1e-4)


def test_a_uniform_system_guesses(tokenizer):
    """MC2 of a uniform system is the share of correct answers, if all answers have one length."""
    size = len(tokenizer)
    uniform = likelihood.Distribution(
        lambda ids, mask: torch.full((*ids.shape, size), -math.log(size)), torch.device("cpu")
    )
    row = {"prompt": "Q:", "best": "a", "correct": ("a",), "incorrect": ("b", "c", "d")}
    got = likelihood.truthfulqa(uniform, [row], tokenizer)
    # A tie does not count as a success
    assert got.mc2.value == pytest.approx(0.25) and got.mc1.value == 0.0


def test_what_is_refused(tokenizer):
    base = make_backbone("llama")
    with pytest.raises(ValueError, match="one number for each model, got 2 for 1"):
        of_genarm(base, [base], [1.0, 2.0])
    with pytest.raises(ValueError, match=r"objective must be in 0\.\.0, got 1"):
        of_reward_head(make_model("llama"), 1)
    with pytest.raises(ValueError, match="padding_side must be left or right"):
        likelihood.token_log_probs(of_model(base), random_texts(0), padding_side="both")
    with pytest.raises(ValueError, match="at least one, got none"):
        likelihood.truthfulqa(of_model(base), [], tokenizer)
    with pytest.raises(ValueError, match="at least one pair"):
        likelihood.pair_accuracy(of_model(base), [], tokenizer)
