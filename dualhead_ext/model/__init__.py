# SPDX-License-Identifier: Apache-2.0
"""A backbone of transformers with the gated head in the place of its lm_head."""
