# SPDX-License-Identifier: Apache-2.0
"""What is written to disk so that a kill or a full disk leaves the old state whole."""
