# SPDX-License-Identifier: Apache-2.0
"""`dualhead train`: its output, Ctrl-C and resuming, options in a file, and its last report."""

import contextlib
import io
import json
import re
import shlex
from dataclasses import fields

import pytest
import torch
from legible import check_legible
from safetensors.torch import load_file
from terminal import Terminal

import dualhead_ext as dh
from dualhead_ext import cli
from dualhead_ext.cli import train_config, training_data, training_options, training_summary
from dualhead_ext.cli.progress import log_line
from dualhead_ext.cli.train import _training_arguments
from dualhead_ext.cli.training_plot import training_figure
from dualhead_ext.eval.heads.sweep import Reply
from dualhead_ext.eval.likelihood import Text

STEPS = 150
CONFIG = f"""\
# A run small enough to be interrupted in a test.
data: pairs.jsonl
eval-data: held_out.jsonl
output: heads
max_steps: {STEPS}
batch-size: 1
logging_steps: 1
learning_rate: 1e-2
max_length: 48
max_grad_norm: 0.5   # of TrainingArguments, no option of its own
"""


def run(*argv):
    try:
        return cli.main([str(word) for word in argv])
    except SystemExit as stop:
        return stop.code


def write_rows(path, rows):
    path.write_text("".join(json.dumps(dict(row)) + "\n" for row in rows))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with pairs and a config file. It is the working directory of this module."""
    folder = tmp_path_factory.mktemp("train")
    write_rows(folder / "pairs.jsonl", dh.data.load_preference_data("embedded")[:8])
    held_out = [dict(row) for row in dh.data.load_preference_data("embedded", "test")[:6]]
    for row in held_out[2:]:  # fewer prompts than the number of replies that are shown
        row["prompt"] = held_out[1]["prompt"]
    write_rows(folder / "held_out.jsonl", held_out)
    (folder / "run.yaml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def stopped(place):
    """(what the terminal showed, the exit code) of a run that Ctrl-C stops in the middle."""
    person = Terminal("train", "--config", "run.yaml", PYTHONUNBUFFERED="1")
    shown = person.until(rf"step +\d+/{STEPS} [^\n]*\n")
    person.type("\x03")
    rest, code = person.end()
    return shown + rest, code


@pytest.fixture(scope="module")
def resumed(stopped, place):
    """The output of the command that the stopped run suggests."""
    command = re.search(r"to resume: (dualhead train .*--resume)", stopped[0])[1]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert run(*shlex.split(command)[1:]) == 0
    return printed.getvalue()


def test_ctrl_c_finishes_the_step_and_leaves_a_checkpoint(stopped, place):
    shown, code = stopped
    assert code == 130 and "Traceback" not in shown
    assert "stopping after this step; Ctrl-C again stops at once" in shown
    step = int(re.search(r"stopped at step (\d+); to resume: dualhead train", shown)[1])
    assert 0 < step < STEPS
    state = json.loads((place / "heads" / f"checkpoint-{step}" / "trainer_state.json").read_text())
    assert state["global_step"] == step
    # The histogram goes to the reporters, not to the terminal.
    assert any("gate/histogram/0.0-0.1" in row for row in state["log_history"])
    assert "histogram" not in shown and "{" not in shown
    line = re.search(rf"step +1/{STEPS} .*", shown)[0]
    assert re.search(r"loss +[\d.]+ +pairs right +ties +alpha 0\.500 +KL +[\d.e-]+$", line)
    assert not (place / "heads" / "dualhead_config.json").exists()


@pytest.mark.slow
def test_it_goes_on_to_the_heads_of_a_run_that_was_not_stopped(resumed, place):
    assert run("train", "--config", "run.yaml", "--output", "whole") == 0
    whole = load_file(place / "whole" / "dualhead_model.safetensors")
    got = load_file(place / "heads" / "dualhead_model.safetensors")
    assert whole.keys() == got.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in whole.items())


def test_the_end_says_what_came_of_it(resumed, place):
    assert "before                  6 ties: an untrained head prefers nothing" in resumed
    assert re.search(r"after +[\d.]+ % of 6 pairs \(95 % interval [\d.]+ to [\d.]+ %\)", resumed)
    assert re.search(r"mean alpha +0\.500 before, 0\.500 after", resumed)
    kl = float(re.search(r"KL from the backbone +0 before, ([\d.]+) after", resumed)[1])
    assert 0.02 < kl < 0.5  # calibrated to 0.1
    assert resumed.count("    before: ") == resumed.count("    after:  ") == 3
    assert resumed.index(f"{STEPS}/{STEPS}") < resumed.index("\ncalibrating the strength: ")
    assert "curves in heads/training.png" in resumed and "dualhead generate heads" in resumed
    assert (place / "heads" / "training.png").read_bytes().startswith(b"\x89PNG")


def test_the_card_says_how_well_they_rank(resumed, place):
    card = (place / "heads" / "README.md").read_text()
    percent = re.search(r"after +([\d.]+ %) of 6 pairs", resumed)[1]
    assert "accuracy on 6 held-out pairs of held_out.jsonl | 95 % interval |" in card
    assert f"| reward head | {percent} |" in card
    assert f"Trained on 8 pairs of pairs.jsonl, {STEPS} optimizer steps." in card
    # If the heads are saved again, the figures that belong to them are saved too.
    model = dh.DualHeadForCausalLM.from_pretrained(place / "heads")
    model.save_pretrained(place / "heads")
    assert "accuracy on" not in (place / "heads" / "README.md").read_text()
    (place / "heads" / "README.md").write_text("mine\n")
    model.save_pretrained(place / "heads")
    assert (place / "heads" / "README.md").read_text() == "mine\n"


# --- the curves -----------------------------------------------------------------------------------


def history(steps, tied=0):
    """Logs of a run. In the first ``tied`` steps the heads prefer neither response."""
    return [
        {
            "step": step,
            "loss": 0.7 / step,
            "rewards/accuracies": 0.0 if step <= tied else 1 - 0.4 / step,
            "rewards/chosen": 0.0 if step <= tied else 0.1 * step,
            "rewards/rejected": 0.0 if step <= tied else -0.1,
            "gate/mean": 0.5,
            "kl": 1e-4 * (step - 1) ** 2,
        }
        for step in range(1, steps + 1)
    ]


@pytest.mark.parametrize("steps", [1, 2, 12, 40])
def test_the_curves_are_legible_and_ties_are_no_accuracy(steps):
    figure = training_figure(history(steps, tied=1), "Held-out pairs right: 98.1 % after", (0.5, 1))
    check_legible(figure)
    lines = {axes.get_title().split(" ")[0]: axes.get_lines() for axes in figure.axes}
    assert len(lines["loss"][0].get_xdata()) == steps
    assert [line.get_label() for line in lines["share"][1:]] == ["training", "held out"]
    # Steps with ties are left out
    assert list(lines["share"][1].get_xdata()) == list(range(2, steps + 1))
    assert list(lines["share"][2].get_xdata()) == [0, steps]


def test_the_line_of_a_log_says_ties():
    ties, learnt = history(2, tied=1)
    assert "pairs right ties " in log_line(ties, 1, 2)
    assert "pairs right 80.0% " in log_line(learnt, 2, 2)
    assert log_line(ties, 1, 2).index("alpha") == log_line(learnt, 2, 2).index("alpha")


# --- options in a file ----------------------------------------------------------------------------


def parsed(*argv):
    parser = cli.build_parser()
    return parser.parse_args(cli._with_config(["train", *map(str, argv)], parser))


def test_a_stream_is_read_while_it_trains(place, capsys, monkeypatch):
    """In the order of the rows, streaming gives the same heads as rows in memory."""
    pytest.importorskip("datasets", reason="the extra data is not installed")
    monkeypatch.setattr(training_data, "_SHUFFLED", 1)
    words = ["--data", "pairs.jsonl", "--eval-data", "held_out.jsonl", "--max-steps", 3]
    words += ["--batch-size", 2, "--max-length", 48, "--set", "calibrate=false"]
    assert run("train", *words, "--streaming", "--output", "stream") == 0
    printed = capsys.readouterr().out
    assert "a stream of pairs to train on, 6 held out" in printed
    assert "a stream of pairs of pairs.jsonl" in (place / "stream" / "README.md").read_text()
    words += ["--set", "train_sampling_strategy=sequential"]
    assert run("train", *words, "--output", "rows") == 0
    streamed, expected = (
        load_file(place / name / "dualhead_model.safetensors") for name in ("stream", "rows")
    )
    for name, value in expected.items():
        torch.testing.assert_close(streamed[name], value, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    "words, said",
    [
        ("--data pairs.jsonl", "--streaming: needs --max-steps, since the number"),
        ("--max-steps 2 --cache-hidden states", "--cache-hidden: the hidden states of a stream"),
        ("--max-steps 2 --data none.jsonl", "--data: stream: there is no file none.jsonl"),
    ],
)
def test_what_a_stream_cannot_do(place, capsys, words, said):
    pytest.importorskip("datasets", reason="the extra data is not installed")
    assert run("train", "--streaming", "--output", "nothing", *words.split()) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (place / "nothing").exists()


def test_the_command_line_stands_over_the_file(place):
    (place / "some.yaml").write_text(
        "output: a\nbatch_size: 3\nlearning-rate: 1e-3\noverwrite: true\nresume: false\n"
        "gate: linear\nseed:\nmax_grad_norm: 2\n"
    )
    found = parsed("--config", "some.yaml", "--output", "b", "--set", "max_grad_norm=3")
    assert (found.output, found.per_device_train_batch_size, found.gate) == ("b", 3, "linear")
    assert found.learning_rate == 1e-3 and found.overwrite and found.resume is None
    assert found.seed is None
    assert dict(found.set) == {"max_grad_norm": "3"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epochz: 3\noutput: a\nfoo: 1", "unknown: epochz (did you mean epochs?), foo"),
        ("- a\n- b", "expected names of options and their values, got a list"),
        ("a: [", "--config:"),
        ("output: [a]", "output: expected one value, got ['a']"),
        ("overwrite: maybe", "overwrite: expected true or false, got 'maybe'"),
        ("limit: 0", "--limit: expected a whole number of at least 1, got '0'"),
        ("gate: open", "invalid choice: 'open'"),
        ("run_name: 2026-01-31", "run_name: expected text, numbers, lists or mappings of them"),
        ("optim_args: &a [*a]", "optim_args: expected text, numbers, lists or mappings of them"),
        pytest.param(
            "optim_args: " + 2000 * "[", "--config: maximum recursion depth exceeded", id="deep"
        ),
    ],
)
def test_mistakes_in_the_file_are_one_sentence(text, words, place, capsys):
    (place / "bad.yaml").write_text(text)
    assert run("train", "--output", "new", "--config", "bad.yaml") == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1, error
    assert not (place / "new").exists()


def test_a_missing_file(place, capsys):
    assert run("train", "--output", "new", "--config", "none.yaml") == 2
    assert "--config:" in capsys.readouterr().err


def test_without_yaml_the_extra_is_named(place, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(cli.UserError, match=r"dualhead_ext\[train\]"):
        train_config.config_words("run.yaml", commands_of("train"))


def test_without_transformers_the_extra_is_named(place, monkeypatch):
    """Looking up the name of a field needs a class that transformers provides."""
    import sys

    (place / "field.yaml").write_text("max_grad_norm: 2")
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "dualhead_ext.train.arguments", raising=False)
    with pytest.raises(cli.UserError, match=r"package transformers .*dualhead_ext\[hf\]"):
        train_config.config_words(str(place / "field.yaml"), commands_of("train"))


def test_reporters_are_an_option(place, monkeypatch, capsys):
    argv = ["train", "--output", "new", "--report-to", "tensorboard, wandb"]
    assert run(*argv) == 2
    assert "--report-to: " in capsys.readouterr().err
    monkeypatch.setattr(
        "transformers.integrations.get_available_reporting_integrations",
        lambda: ["tensorboard", "wandb"],
    )
    found = _training_arguments(parsed(*argv[1:]))
    assert found.report_to == ["tensorboard", "wandb"]


def test_help_has_the_arguments_defaults():
    known = {f.name: f.default for f in fields(dh.DualHeadTrainingArguments)}
    known |= training_options.PRESETS["default"]["training"]
    shown = training_options.help_defaults()
    expected = {name: known[name] for name in shown} | {"report_to": "none"}
    assert shown == expected


# --- what is wrong with heads ---------------------------------------------------------------------


def figures(**given):
    return training_summary.Figures(**({"kl": 0.1, "alpha": 0.5} | given))


def replies(*texts):
    return [("?", *(Reply(t, True, Text([], [])) for t in pair)) for pair in texts]


def config_of(**given):
    return dh.DualHeadConfig(8, 32, **given)


CURVE = [[0.0, 0.0], [1.0, 0.1]]


@pytest.mark.parametrize(
    ("after", "said", "config", "words"),
    [
        (figures(), [("a", "b")], config_of(), []),
        (figures(), [("a", "a"), ("b", "c")], config_of(), []),
        (figures(), [("a", "a"), ("b", "b")], config_of(), ["--set calibrate=true"]),
        (figures(), [("a", "a")], config_of(kl_curve=CURVE), ["--epochs", "--strength 3"]),
        (figures(kl=1e-5), [], config_of(kl_curve=CURVE), ["--learning-rate"]),
        (
            figures(below=0.95),
            [("a", "b")],
            config_of(),
            ["collapsed to 0: the text is the backbone's", "--gate-learning-rate 0.001"],
        ),
        (figures(above=0.95), [("a", "b")], config_of(), ["collapsed to 1", "--gate fixed"]),
        (figures(above=1.0), [("a", "b")], config_of(gate="fixed"), []),
    ],
)
def test_what_is_wrong_names_an_option(after, said, config, words):
    found = training_summary.warnings_of(after, replies(*said), config, 0.01)
    assert bool(found) == bool(words)
    assert all(word in "; ".join(found) for word in words)
    options = {s for a in commands_of("train")._actions for s in a.option_strings}
    options |= {"--strength"}
    assert set(re.findall(r"--[a-z0-9-]+", "; ".join(found))) <= options


def commands_of(name):
    parser = cli.build_parser()
    return next(a for a in parser._actions if a.dest == "command").choices[name]


def test_heads_that_learnt_nothing_say_so(place, capsys):
    argv = ["train", "--data", "pairs.jsonl", "--eval-data", "held_out.jsonl", "--max-steps", "1"]
    argv += ["--batch-size", "2", "--max-length", "48"]
    paper = ["--preset", "paper", "--accumulate", "1", "--learning-rate", "1e-9"]
    assert run(*argv, *paper, "--output", "little") == 0
    assert "Note: the replies are the backbone's" in capsys.readouterr().out
    assert run(*argv, "--learning-rate", "0", "--output", "none") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "the reward head has learnt nothing" in error and "--learning-rate" in error
