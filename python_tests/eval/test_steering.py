# SPDX-License-Identifier: Apache-2.0
"""The steering suite: its policies against plain decoding, and its search for a KL.

A whole run uses the smallest scale, and is started as a user would start it.
"""

import gzip
import json
import math
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessorList

import dualhead_ext as dh
from dualhead_ext import cli
from dualhead_ext.eval import sampling
from dualhead_ext.eval.paper.cells import Store
from dualhead_ext.eval.rollout import Backbone, read_prompts, response_logprobs, roll_out
from dualhead_ext.eval.steering import goals, report, steps, timing
from dualhead_ext.eval.steering.attributes import ATTRIBUTES, OPEN, PROVOKING, prompts_of
from dualhead_ext.eval.steering.plan import KL_TARGETS, SIZED, SIZES, Planner
from dualhead_ext.eval.steering.policies import GatedPolicy, GuidedPolicy
from dualhead_ext.eval.steering.training import pairs_of, ranked_rows
from dualhead_ext.head import calibration

PROMPTS = ["\n\nHuman: Hi\n\nAssistant:", "\n\nHuman: How do I bake a loaf of bread?\n\nAssistant:"]
NEW = 6


@pytest.fixture(scope="module")
def backbone():
    path = dh.data.embedded_backbone_path()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="module")
def prefix(backbone):
    return read_prompts(*backbone, PROMPTS)


def gated(gate="attention", **config):
    """A gated head whose weights are not those of the start, with a backbone of its own."""
    torch.manual_seed(0)
    path = str(dh.data.embedded_backbone_path())
    model = dh.DualHeadForCausalLM.from_backbone(
        path, dtype=torch.float32, reward_head="embedding", reward_rank=4, gate=gate, **config
    )
    with torch.no_grad():
        for parameter in model.lm_head_module.reward_head.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        for parameter in model.lm_head_module.gate.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def test_the_backbones_rollout_is_the_samplers_first_response(backbone, prefix):
    model, tokenizer = backbone
    ends = [model.generation_config.eos_token_id]
    rolled = roll_out(model, prefix, Backbone(), NEW, 5, ends)
    expected = sampling.sample(model, tokenizer, PROMPTS, range(1), NEW, seed=5)
    for row, written, (response,) in zip(rolled.tokens, rolled.written, expected, strict=True):
        ids = row[: int(written.sum())].tolist()
        assert sampling.response(ids, tokenizer, ends) == response
    assert rolled.kl.abs().max() == 0.0 and rolled.alpha is None


def test_logprobs_are_those_of_the_whole_text(backbone, prefix):
    model, tokenizer = backbone
    texts, ended = [" Yes, you can.", " No"], [True, False]
    total, count = 0.0, 0
    for prompt, text, end in zip(PROMPTS, texts, ended, strict=True):
        start, _ = sampling.encode_prompts([prompt], tokenizer)
        own = tokenizer(text, add_special_tokens=False)["input_ids"]
        own = own + [tokenizer.eos_token_id] * end
        ids = torch.cat((start, torch.tensor([own])), 1)
        with torch.no_grad():
            logprobs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        each = logprobs.gather(1, ids[0, 1:, None])[start.shape[1] - 1 :]
        total, count = total + float(each.sum()), count + len(own)
    found = response_logprobs(model, tokenizer, prefix, texts, ended)
    assert found[1] == count and found[0] == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("gate", ["attention", "linear", "fixed"])
def test_a_gated_rollout_is_what_generate_writes(backbone, prefix, gate):
    model, _ = backbone
    dual = gated(gate)
    settings = dual.dual_head_config.to_dict()
    head = dh.DualHead.from_lm_head(model.get_output_embeddings(), **settings)
    own = dual.lm_head_module.state_dict()
    missing, unknown = head.load_state_dict(
        {name: value for name, value in own.items() if "." in name}, strict=False
    )
    assert set(missing) == {"lm_head.weight"} and not unknown
    strength = 1.7
    rolled = roll_out(model, prefix, GatedPolicy(head.eval(), strength), NEW, 3, [])
    seeds = [sampling.row_seed(3, text, 0) for text in PROMPTS]
    out = dual.generate(
        input_ids=prefix.ids,
        attention_mask=prefix.mask,
        strength=strength,
        do_sample=False,
        logits_processor=LogitsProcessorList([sampling.RowNoise(seeds, 1.0, prefix.ids.device)]),
        max_new_tokens=NEW,
        eos_token_id=None,
        pad_token_id=0,
        output_gate=True,
        return_dict_in_generate=True,
    )
    assert out.sequences[:, prefix.ids.shape[1] :].tolist() == rolled.tokens.tolist()
    torch.testing.assert_close(out.gate_alpha, rolled.alpha, rtol=1e-4, atol=1e-5)
    assert rolled.mean("kl") > 0.0


def test_a_rollouts_kl_is_that_of_its_distributions(backbone, prefix):
    from dualhead_ext.head.kl_cap import kl_from_backbone

    model, _ = backbone
    dual = gated()
    head = dh.DualHead.from_lm_head(
        model.get_output_embeddings(), **dual.dual_head_config.to_dict()
    )
    own = dual.lm_head_module.state_dict()
    head.load_state_dict({n: v for n, v in own.items() if "." in n}, strict=False)
    rolled = roll_out(model, prefix, GatedPolicy(head.eval(), 1.0), NEW, 3, [])
    ids = torch.cat((prefix.ids, rolled.tokens), 1)
    mask = torch.cat((prefix.mask, torch.ones_like(rolled.tokens)), 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        hidden = model.get_decoder()(ids, attention_mask=mask, position_ids=positions)[0]
        z_lm = model.get_output_embeddings()(hidden)
        alpha = head(hidden, mask).alpha
        z_rm = head(hidden, mask, alpha=1.0).logits
    expected = kl_from_backbone(z_lm, z_rm, alpha)[:, prefix.ids.shape[1] - 1 : -1]
    torch.testing.assert_close(rolled.kl.double(), expected, rtol=1e-3, atol=1e-5)


def test_guidance_by_the_backbone_itself_changes_nothing(backbone, prefix):
    model, _ = backbone
    plain = roll_out(model, prefix, Backbone(), NEW, 0, [])
    guided = roll_out(model, prefix, GuidedPolicy(model, 2.0), NEW, 0, [])
    assert guided.tokens.tolist() == plain.tokens.tolist()
    assert float(guided.kl.max()) < 1e-6


class _Rolled:
    """A rollout that has nothing but a KL."""

    def __init__(self, kl):
        self.kl = torch.full((1, 4), kl)
        self.written = torch.ones(1, 4, dtype=torch.bool)

    def mean(self, name):
        return float(getattr(self, name).mean())


@pytest.mark.parametrize("power", [1.0, 2.0, 2.6])
@pytest.mark.parametrize("target", [0.05, 0.4])
def test_the_search_ends_near_the_target(power, target):
    runs = []

    def run(prefix, strength):
        runs.append(prefix)
        return _Rolled(0.02 * prefix * strength**power)

    strength, rolled = steps.at_kl(run, [1.0, 1.1, 0.9], target, 1.0)
    kl = steps._pooled(rolled, "kl")[0]
    assert abs(kl / target - 1) <= 0.1
    assert len(runs) <= 9  # the other batches run once or twice
    assert strength > 0


def test_a_kl_out_of_reach_is_an_error():
    with pytest.raises(steps.OutOfReach, match=r"no strength gives a KL of 0\.4"):
        steps.at_kl(lambda prefix, strength: _Rolled(min(0.1, strength)), [1.0], 0.4, 1.0)


def test_a_kl_out_of_reach_is_a_result_and_the_run_goes_on(tmp_path, monkeypatch):
    plan = Planner(SIZES["tiny"], ["sentiment"], 1, [0.1])()
    resources = steps.Resources()
    store = Store(tmp_path, steps.STEPS, resources)
    cell = next(cell for place, cell in plan.decoded.items() if place[0].name == "dual-head")

    def steered(cell, store):
        raise steps.OutOfReach(0.1, [(1.0, 0.01), (8.0, 0.03)])

    monkeypatch.setattr(steps, "_steered", steered)
    store.compute(cell)
    assert store.result(cell) == {"out_of_reach": [[1.0, 0.01], [8.0, 0.03]]}
    assert store.done(cell)
    report.write(plan, store)
    assert json.loads((tmp_path / "results.json").read_text()) == []
    run = json.loads((tmp_path / "run.json").read_text())
    assert cell.label not in run["missing"] and len(run["missing"]) == len(plan.decoded) - 1
    page = (tmp_path / "README.md").read_text()
    assert f"{cell.label}: at most 0.03 nats per token of 2 tries, at strength 8" in page


@pytest.mark.parametrize("kind", [OPEN, PROVOKING])
def test_prompts_of_training_calibration_and_measurement_are_disjoint(kind):
    try:
        splits = [set(prompts_of(kind, s, 1000)) for s in ("train", "calibration", "measure")]
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert [len(found) for found in splits] == [208, 64, 208]
    assert not splits[0] & splits[1] and not splits[0] & splits[2] and not splits[1] & splits[2]


def test_the_planned_cells_read_their_own_splits():
    plan = Planner(SIZES["standard"], list(ATTRIBUTES))()
    for cell in plan.decoded.values():
        for role, need in cell.needs.items():
            if need.step == "samples":
                assert need.options["split"] == "measure", role
            for role, deeper in need.needs.items():
                split = {"samples": "train", "held_out": "calibration"}[role]
                assert deeper.options["split"] == split
    keys = [cell.key for cell in plan.cells()]
    assert len(set(keys)) == len(keys)
    own = {cell.key for cell in plan.sizes.values()} - {c.key for c in plan.decoded.values()}
    assert len(plan.sizes) == 3 * len(SIZED) and len(own) == 3 * 5  # ranks above 0
    # Sentiment has every system. The other attributes have the winner, the paper's, GenARM, DPO and
    # best of 4.
    systems = {}
    for system, attribute, target, _ in plan.decoded:
        systems.setdefault(attribute, set()).add((*system.parts.values(), target))
    gated = {(head, gate) for _, head, gate, _ in systems["sentiment"] if head}
    assert len(gated) == 9
    for target in KL_TARGETS:
        assert sum(t == target for *_, t in systems["sentiment"]) == 9 + 3
    assert {name for name, *_ in systems["toxicity"]} == {
        "backbone", "dual-head", "paper", "genarm", "dpo", "best-of-4",
    }  # fmt: skip


def test_samples_become_ranked_rows_of_each_attribute():
    samples = [
        {"prompt": "How was it?", "responses": ["Great fun!", "", "Bad.", "Awful, really awful."],
         "ended": [True, True, False, True]},
        {"prompt": "And?", "responses": ["Yes.", ""], "ended": [True, True]},
    ]  # fmt: skip
    rows = ranked_rows(samples, ["sentiment", "brevity"])
    assert [row["objective"] for row in rows] == [0, 1]
    texts = [response[0]["content"] for response in rows[0]["responses"]]
    assert texts == ["Great fun!", "Bad.", "Awful, really awful."]
    assert rows[0]["ended"] == [True, False, True]
    pairs = pairs_of(rows)
    assert pairs[0]["chosen"][0]["content"] == "Great fun!"
    assert pairs[1]["chosen"][0]["content"] == "Bad."


def test_a_goal_is_judged_on_three_seeds_only():
    def row(system, seed, gold, heldout, target=0.1):
        place = dict.fromkeys(("reward_head", "gate"))
        if system == "dual-head":
            place = dict(goals.DEFAULT)
        return {
            "system": system, **place, "attribute": "sentiment", "kl_target": target, "gold": gold,
            "heldout": heldout, "perplexity": 18.0 + 10 * (system == "dual-head"), "seed": seed,
        }  # fmt: skip

    def gains(seed, value, low, **other):
        place = {"system": "dual-head", **goals.DEFAULT, "kl_target": 0.1, "seed": seed} | other
        scores = {"vader": [value, low, 1.0], "afinn": [value, low, 1.0]}
        return place | {"attribute": "sentiment", "gains": scores}

    def table(rows, found):
        return goals.table(rows, {"gains": found, "costs": {}, "front": {}, "training_time": None})

    def judged(rows, found):
        lines = table(rows, found).splitlines()[2:]
        return [line.split(" | ")[-1].removesuffix(" |") for line in lines]

    rows = [row("backbone", seed, 0.3, 0.1, None) for seed in range(3)]
    rows += [row("dual-head", seed, 0.6, 0.2) for seed in range(3)]
    clear = [gains(seed, 0.3, 0.2) for seed in range(3)]
    verdicts = judged(rows, clear)
    assert verdicts[:2] == ["yes", "yes"] and verdicts[2] == "-"
    assert verdicts[6] == "**no**"  # its perplexity is too high
    assert judged(rows, [*clear[:2], gains(2, 0.3, -0.01)])[0] == "**no**"
    assert judged([r for r in rows if r["seed"] == 0], clear[:1])[:2] == ["open", "open"]
    # Systems are compared on the seeds that both have: 0.2 against 0.25, not the mean 0.3.
    uneven = [gains(seed, value, 0.1) for seed, value in enumerate((0.2, 0.3, 0.4))]
    rival = gains(0, 0.25, 0.1, system="dpo", reward_head=None, gate=None)
    assert "| +0.20 against +0.25 (1 seed) | open |" in table(rows, [*uneven, rival])
    attention = gains(0, 0.22, 0.1, gate="attention")
    assert "| +10% of the fixed gate's gain (1 seed) | open |" in table(rows, [*uneven, attention])


def test_a_front_is_judged_on_three_seeds_only():
    def verdict(readability, seeds):
        front = {
            str(i / 4): {"sentiment": [i, i - 0.4, i + 0.4], "readability": [value, value, value]}
            | {"kl": 0.1, "seeds": seeds}
            for i, value in enumerate(readability)
        }
        found = {"gains": [], "costs": {}, "front": front, "training_time": None}
        lines = goals.table([], found).splitlines()
        return next(line for line in lines if "five weights" in line).split(" | ")[-1]

    assert verdict([5, 6, 7, 8, 9], 3) == "yes |"
    assert verdict([5, 6, 7, 8, 9], 2) == "open |"
    assert verdict([5, 4.9, 7, 8, 9], 3) == "**no** |"


# --- a whole run ----------------------------------------------------------------------------------

KEYS = [
    "system", "reward_head", "gate", "attribute", "kl_target", "kl", "gold", "gold_ci95", "heldout",
    "perplexity", "words", "tokens_per_second", "train_seconds", "parameters", "prompts", "seed",
]  # fmt: skip


@pytest.mark.slow
def test_a_whole_run_as_a_user_starts_it(tmp_path, capsys, monkeypatch):
    pytest.importorskip("trl", reason="the extra trl is not installed")
    pytest.importorskip("peft", reason="the extra peft is not installed")
    argv = ["eval", "--suite", "steering", "--scale", "tiny", "--out", str(tmp_path),
            "--kl", "0.1", "--seeds", "1", "--attributes"]  # fmt: skip
    monkeypatch.setattr(timing, "TURNS", 1)
    monkeypatch.setattr(calibration, "REQUESTS", 12)
    ours = "backbone,dual-head-embedding-fixed"
    both = [*argv, "sentiment,readability", "--systems", ours]
    assert cli.main([*both, "--minutes", "0"]) == 3
    assert "cells are left" in capsys.readouterr().out
    assert cli.main(both) == 0
    others = "paper,genarm,dpo,args,best-of-4,best-of-16,dual-head-by-size"
    argv = [*argv, "sentiment", "--systems", f"{ours},{others}"]
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    assert "cells to compute, about" in out
    results = json.loads((tmp_path / "results.json").read_text())
    with gzip.open(tmp_path / "texts.jsonl.gz", "rt", encoding="utf-8") as file:
        texts = [json.loads(line) for line in file]
    assert all(list(row) == KEYS for row in results)
    assert {row["system"] for row in results} == {
        "backbone", "dual-head", "paper", "genarm", "dpo", "args", "best-of-4", "best-of-16",
    }  # fmt: skip
    for row in results:
        assert math.isfinite(row["gold"]) and row["gold_ci95"][0] <= row["gold_ci95"][1]
        if row["kl_target"] is not None:
            assert abs(row["kl"] / row["kl_target"] - 1) <= 0.1
        place = {n: row[n] for n in KEYS[:5]} | {"seed": row["seed"]}
        own = [t for t in texts if all(t[n] == v for n, v in place.items())]
        assert [t["prompt"] for t in own] == prompts_of(OPEN, "measure", row["prompts"])
        from dualhead_ext.eval.steering.attributes import measured

        gold = ATTRIBUTES[row["attribute"]].gold
        values = measured(gold, [t["prompt"] for t in own], [t["text"] for t in own])
        assert row["gold"] == pytest.approx(sum(values) / len(values), rel=1e-5, abs=1e-6)
    run = json.loads((tmp_path / "run.json").read_text())
    assert list(run["front"]) == ["0", "0.25", "0.5", "0.75", "1"]
    assert list(run["sizes"]) == list(SIZED)
    parameters = [row["parameters"] for n, row in run["sizes"].items() if n.startswith("embedding")]
    assert len(parameters) > 3 and parameters == sorted(set(parameters))
    default = next(r for r in results if r["reward_head"] == "embedding")
    assert run["sizes"]["embedding, rank 0"]["gold"][0] == pytest.approx(default["gold"], rel=1e-5)
    page = (tmp_path / "README.md").read_text()
    assert "Sentiment" in page and "dual-head embedding fixed" in page
    before = (tmp_path / "results.json").read_bytes()
    assert cli.main(argv) == 0
    assert "0 cells to compute" in capsys.readouterr().out
    assert (tmp_path / "results.json").read_bytes() == before
    # What a report publishes is enough to resume from: no cell is computed again.
    other = tmp_path / "other"
    other.mkdir()
    for name in (report.CELLS, report.SAMPLES, report.TEXTS):
        shutil.copy(tmp_path / name, other / name)
    argv[argv.index(str(tmp_path))] = str(other)
    assert cli.main(argv) == 0
    assert "0 cells to compute" in capsys.readouterr().out
    for name in ("results.json", "run.json", report.TEXTS, report.CELLS, report.SAMPLES):
        assert (other / name).read_bytes() == (tmp_path / name).read_bytes(), name


def test_mistakes_are_one_sentence(tmp_path, capsys):
    out = ["eval", "--suite", "steering", "--out", str(tmp_path / "run")]
    for argv, message in (
        ([*out, "--attributes", "joy"], "--attributes: expected some of sentiment"),
        ([*out, "--systems", "ppo"], "--systems: expected some of backbone, dual-head"),
        ([*out, "--kl", "0"], "--kl: expected numbers above 0"),
        ([*out, "--scale", "gpu"], "--scale: expected one of tiny, standard"),
        ([*out, "--decoders", "backbone"], "--decoders: expected only with --suite paper"),
        (["eval", "--out", "run"], "--scale: expected one of tiny, small, gpu"),
        (["eval", "--scale", "tiny", "--out", "run", "--kl", "1"], "only with --suite steering"),
    ):
        assert cli.main(argv) == 2, argv
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    assert not (tmp_path / "run").exists()
