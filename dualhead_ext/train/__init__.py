# SPDX-License-Identifier: Apache-2.0
"""Training the heads on a frozen backbone."""
