# SPDX-License-Identifier: Apache-2.0
"""The effect of steering: ``dualhead eval --suite steering``.

Every system decodes at the same distance from the backbone, in nats per token. The texts are scored
by the scorer that ranked the training data and by held-out scorers. :mod:`.attributes` defines what
is steered, :mod:`.plan` the cells, :mod:`.steps` how each is computed, :mod:`.policies` the
decoders, :mod:`.report` the output.
"""
