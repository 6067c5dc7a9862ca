# SPDX-License-Identifier: Apache-2.0
"""The training loss: its terms, its reference, and the chunked path that never holds all logits."""
