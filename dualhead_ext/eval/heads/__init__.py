# SPDX-License-Identifier: Apache-2.0
"""``dualhead eval HEADS``: what trained heads do to their backbone, on pairs and on prompts.

``states`` reads a backbone once for all settings of its heads, ``pairs`` and ``sweep`` measure,
``report`` and ``plot`` write.
"""
