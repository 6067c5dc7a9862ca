# SPDX-License-Identifier: Apache-2.0
"""Programs for developers of this package; none of them is installed with it."""
