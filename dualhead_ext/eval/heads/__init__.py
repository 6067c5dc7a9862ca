# SPDX-License-Identifier: Apache-2.0
"""``dualhead eval HEADS``: how trained heads change their backbone, on pairs and on prompts.

``states`` runs the backbone once for all settings of its heads, ``pairs`` and ``sweep`` compute the
figures, ``report`` and ``plot`` write them.
"""
