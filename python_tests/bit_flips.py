# SPDX-License-Identifier: Apache-2.0
"""Flip one bit of a file."""


def flip(path, position, bit):
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)
