# SPDX-License-Identifier: Apache-2.0
"""Checks and measurements on a machine with a GPU: ``python -m tools.gpu.check`` and its parts."""
