"""Signals as an exception: in a process of its own, so that pytest's handlers stay."""

import subprocess
import sys

PROGRAM = """
import os, signal, sys, time
from fedpruner_common.interrupt import Stopped, heard, held, raise_on_signals

raise_on_signals()
try:
    {body}
except Stopped:
    heard()
    os.kill(os.getpid(), signal.SIGTERM)  # more of them do not disturb the clean-up
    time.sleep(0.7)
    print("clean")
"""


def output_of(body: str) -> str:
    program = PROGRAM.format(body=body.replace("\n", "\n    "))
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True
    )
    assert not result.stderr
    return result.stdout


def test_a_signal_unwinds_to_where_it_is_caught():
    assert output_of("os.kill(os.getpid(), signal.SIGINT)\nprint('not reached')") == "clean\n"


def test_a_stop_that_somebody_swallowed_comes_again():
    swallow = """
try:
    os.kill(os.getpid(), signal.SIGTERM)
except BaseException:
    print("swallowed")
time.sleep(20)"""
    assert output_of(swallow) == "swallowed\nclean\n"


def test_what_is_held_happens_whole():
    body = """
with held():
    os.kill(os.getpid(), signal.SIGTERM)
    print("whole")
time.sleep(20)"""
    assert output_of(body) == "whole\nclean\n"
