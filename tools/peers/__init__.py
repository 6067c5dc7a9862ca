# SPDX-License-Identifier: Apache-2.0
"""Test suites of other libraries, run on gated models: `make test-peers`.

The test files come from the source archives of the installed versions and are loaded unchanged;
the model under test is replaced by a gated one. Tests that cannot apply are listed with their
reasons in :mod:`tools.peers.inapplicable`.
"""
