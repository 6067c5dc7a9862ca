# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C and SIGTERM while a command runs: the exit code, what a second signal does, several
processes, the command that resumes. A whole run that Ctrl-C stops is in test_train_command.py."""

import os
import signal
from types import SimpleNamespace

import pytest
from command_line import TINY, run, write_pairs
from torchrun import run_in_two_processes

from dualhead_ext.cli import commands
from dualhead_ext.cli.errors import UserError
from dualhead_ext.cli.interruption import StopAfterStep
from dualhead_ext.cli.train import resuming_command

SIGNALS = [signal.SIGINT, signal.SIGTERM]


@pytest.fixture
def interruptible():
    """Python's own handling of Ctrl-C, which a background job of a shell does not have. SIGTERM
    raises an error, instead of ending the tests.
    """

    def stray(signum, frame):
        raise AssertionError("SIGTERM reached the handler of the tests")

    before = {signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler)}
    before[signal.SIGTERM] = signal.signal(signal.SIGTERM, stray)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("name", ["sample", "eval", "bench", "demo", "generate", "chat"])
def test_a_signal_ends_a_command_with_its_code(interruptible, monkeypatch, name, number):
    """What the command has open is closed: the exception passes through it. Another signal of the
    same kind does not interrupt that; launchers pass on one that has reached all processes.
    """
    closed = []

    def busy(arguments):
        try:
            os.kill(os.getpid(), number)
        finally:
            os.kill(os.getpid(), number)
            closed.append(True)

    monkeypatch.setitem(commands.COMMANDS, name, busy)
    needed = {"sample": ["--backbone", "embedded", "--prompts", "open", "--scorer", "vader"]}
    needed["sample"] += ["--out", "x.jsonl"]
    needed |= {"generate": ["heads", "hi"], "chat": ["heads"], "eval": ["heads", "--out", "x"]}
    assert run(name, *needed.get(name, [])) == 128 + number
    assert closed == [True]


@pytest.mark.parametrize("number", SIGNALS)
def test_train_finishes_the_step_and_says_how_to_resume(
    interruptible, tmp_path, capfd, monkeypatch, number
):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(StopAfterStep, "on_step_begin", on_step_begin)
    data, output = write_pairs(tmp_path / "pairs.jsonl", 8), tmp_path / "heads"
    words = ["train", "--data", str(data), "--eval-data", str(data), "--output", str(output)]
    assert run(*words, *TINY, "--max-steps", "4") == 128 + number
    error = capfd.readouterr().err
    assert "\nstopped at step 2; to resume: dualhead train" in error and "Traceback" not in error
    assert ("Ctrl-C again" in error) == (number == signal.SIGINT)
    assert (output / "checkpoint-2").is_dir() and not (output / "dualhead_config.json").exists()


@pytest.mark.parametrize("number", SIGNALS)
def test_train_that_is_stopped_before_it_trains_says_so(
    interruptible, tmp_path, capfd, monkeypatch, number
):
    def load(arguments):
        os.kill(os.getpid(), number)

    monkeypatch.setattr("dualhead_ext.cli.training_data.load", load)
    assert run("train", "--output", str(tmp_path / "heads")) == 128 + number
    error = capfd.readouterr().err
    assert error == "\nstopped before the first checkpoint; there is nothing to resume\n"


def test_an_import_that_turns_a_signal_into_an_error_does_not_hide_it(interruptible, monkeypatch):
    def importing(arguments):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except SystemExit:
            raise UserError("the package torch cannot be imported") from None

    monkeypatch.setitem(commands.COMMANDS, "info", importing)
    assert run("info") == 143


def test_a_second_ctrl_c_is_what_it_was_outside(interruptible):
    stop = StopAfterStep()
    with pytest.raises(KeyboardInterrupt), stop.listening():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_sigterm_waits_for_the_step_and_ctrl_c_does_not(interruptible):
    """A launcher such as torchrun passes on the SIGTERM that a cluster sends to all processes."""
    stop = StopAfterStep()
    with pytest.raises(KeyboardInterrupt), stop.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        control = SimpleNamespace(should_save=False, should_training_stop=False)
        stop.on_step_end(SimpleNamespace(world_size=1), None, control)
        assert control.should_save and control.should_training_stop
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("number", SIGNALS)
def test_two_processes_stop_after_the_same_step(tmp_path, number):
    """Both exit with the code of the signal, which one of them got."""
    run_in_two_processes("ddp_interrupt.py", tmp_path, str(int(number)))
    told = [(tmp_path / f"told-{rank}.txt").read_text() for rank in range(2)]
    assert told == [f"[False, True, True] {128 + number}"] * 2


def test_after_the_last_step_ctrl_c_stops_at_once(interruptible):
    """Calibration follows the last step, so there is no step to finish."""
    stop = StopAfterStep()
    with pytest.raises(KeyboardInterrupt), stop.listening():
        stop.on_train_end(None, None, None)
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_suggested_command_resumes():
    argv = ["train", "--output", "my heads", "--overwrite", "--resume", "old", "--epochs", "3"]
    assert resuming_command(argv) == "dualhead train --output 'my heads' --epochs 3 --resume"
    assert resuming_command(["train", "--resume"]) == "dualhead train --resume"
    assert resuming_command(["train", "--resume=x", "-q"]) == "dualhead train -q --resume"
