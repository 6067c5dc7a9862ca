# SPDX-License-Identifier: Apache-2.0
"""A transformers backbone whose lm_head is the gated head."""
