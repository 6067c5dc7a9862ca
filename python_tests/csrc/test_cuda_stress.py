# SPDX-License-Identifier: Apache-2.0
"""The CUDA step under load on a real device.

The tests make very many launches, keep the device busy with other kernels, take every batch size,
and launch from several host threads at once. Two things may go wrong: a barrier waits for blocks
that never run, or a launch leaves something behind that changes the next one.
"""

from __future__ import annotations

import threading

import pytest
import torch
from decode_cases import STATE, assert_same_bits, bits, make_case, quantized, rows, run

from dualhead_ext import ops

pytestmark = pytest.mark.cuda
DEVICE = "cuda"
BF16 = torch.bfloat16
LAUNCHES, IN_A_GRAPH = 100_000, 100


def make(seed, *sizes, format=None, **options):
    case = make_case(seed, *sizes, BF16, **options)
    case = quantized(case, format) if format else case
    return {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in case.items()}


@pytest.mark.parametrize("format", [None, "int8", "int4"])
@pytest.mark.parametrize("B", [1, 9])
def test_a_hundred_thousand_launches_end_and_agree(B, format, seed):
    """Launches follow one another directly: one begins while blocks of the last one still end."""
    case = make(seed, B, 128, 515, 1, format=format, H=2, d_k=16, S=40)
    expected, _ = run(ops.decode_step, case)
    before = {name: case[name].clone() for name in STATE if name in case}
    side = torch.cuda.Stream()
    with torch.no_grad():
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run(ops.decode_step, case)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(IN_A_GRAPH):
                case["cache_length"].copy_(before["cache_length"])
                captured = ops.decode_step(**case)
        for number in range(LAUNCHES // IN_A_GRAPH):
            graph.replay()
            if number % 100 == 99:
                torch.cuda.synchronize()
                assert_same_bits(captured, expected, f"after {number + 1} replays")


@pytest.mark.parametrize(("B", "format"), [(1, None), (64, None), (1, "int4")])
def test_other_kernels_may_hold_the_multiprocessors(B, format, seed):
    """GEMMs on two other streams occupy all multiprocessors at times.

    The step waits for its turn.
    """
    case = make(seed, B, 512, 8003, 1, format=format, H=8, d_k=48, S=100, sample=True)
    expected, state = run(ops.decode_step, case)
    others = [torch.cuda.Stream() for _ in range(2)]
    matrices = [torch.randn(4096, 4096, device=DEVICE, dtype=BF16) for _ in others]
    torch.cuda.synchronize()
    for _ in range(30):
        for stream, matrix in zip(others, matrices, strict=True):
            with torch.cuda.stream(stream):
                for _ in range(4):
                    torch.mm(matrix, matrix)
        got, left = run(ops.decode_step, case)
        assert_same_bits(got, expected)
        assert_same_bits(left, state)
    torch.cuda.synchronize()


@pytest.mark.parametrize("format", [None, "int8", "fp8", "int4"])
def test_every_batch_from_1_to_64(format, seed):
    """Each row has the same bits as in a batch of 64."""
    case = make(seed, 64, 384, 1003, 1, format=format, H=4, d_k=16, S=60, sample=True)
    expected, state = run(ops.decode_step, case)
    for B in range(1, 65):
        first = list(range(B)) if B % 2 else list(range(64 - B, 64))
        got, left = run(ops.decode_step, rows(case, first))
        for name, value in zip(expected._fields, expected, strict=True):
            if value.numel():
                assert torch.equal(bits(getattr(got, name)), bits(value[first])), (B, name)
        for name, value in state.items():
            assert torch.equal(bits(left[name]), bits(value[first])), (B, name)


def test_three_threads_with_different_plans(seed):
    """Threads launch blocks with little and with much shared memory in turns.

    What one thread asks of the driver must not change what another thread launches with.
    """
    cases = [
        make(seed, 1, 512, 5003, 1, H=8, d_k=48, S=64),
        make(seed + 1, 64, 4096, 999, 1, format="int4", H=2, d_k=16, S=64),
        make(seed + 2, 9, 136, 70, 2, H=1, d_k=8, S=9),
    ]
    expected = [run(ops.decode_step, case) for case in cases]
    torch.cuda.synchronize()
    problems: list[BaseException] = []
    start = threading.Barrier(len(cases))

    def work(case, right):
        try:
            start.wait()
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(300):
                    got, left = run(ops.decode_step, case)
                torch.cuda.current_stream().synchronize()
            assert_same_bits(got, right[0])
            assert_same_bits(left, right[1])
        except BaseException as error:
            problems.append(error)

    threads = [
        threading.Thread(target=work, args=pair) for pair in zip(cases, expected, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if problems:
        raise problems[0]
