# SPDX-License-Identifier: Apache-2.0
"""What steering buys: ``dualhead eval --suite steering``.

Every system is decoded at the same distance from the backbone, in nats per token, and the texts are
scored by the scorer that made the training data and by others that nothing was trained on.
:mod:`.attributes` says what is steered, :mod:`.plan` which cells there are, :mod:`.steps` how each
is computed, :mod:`.policies` what decodes, :mod:`.report` what is written.
"""
