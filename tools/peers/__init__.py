# SPDX-License-Identifier: Apache-2.0
"""The neighbours' own test suites over gated models: `make test-peers`.

Their files come from their source archives of the installed versions and are loaded as they are;
what a test looks at is a gated model in the place of theirs. Tests that cannot apply are listed,
each with its reason, in :mod:`tools.peers.inapplicable`.
"""
