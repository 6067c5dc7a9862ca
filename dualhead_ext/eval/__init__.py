# SPDX-License-Identifier: Apache-2.0
"""Measuring what a model does."""
