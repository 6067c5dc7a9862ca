# SPDX-License-Identifier: Apache-2.0
"""Writing to disk so that a crash or a full disk leaves the old state intact."""
