# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C while `dualhead train` runs: what a second one does, several processes, the command that
resumes. A whole run that is stopped is in test_train_command.py."""

import os
import signal

import pytest
from torchrun import run_in_two_processes

from dualhead_ext.cli.interruption import StopAfterStep
from dualhead_ext.cli.train import resuming_command


@pytest.fixture
def interruptible():
    """Python's own handling of Ctrl-C, which a background job of a shell does not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_ctrl_c_is_what_it_was_outside(interruptible):
    stop = StopAfterStep()
    with pytest.raises(KeyboardInterrupt), stop.listening():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_two_processes_stop_after_the_same_step(tmp_path):
    run_in_two_processes("ddp_interrupt.py", tmp_path)
    told = [(tmp_path / f"told-{rank}.txt").read_text() for rank in range(2)]
    assert told == ["[False, True, True]"] * 2


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
