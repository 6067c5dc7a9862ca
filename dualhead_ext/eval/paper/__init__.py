# SPDX-License-Identifier: Apache-2.0
"""The paper's comparisons as one run: ``dualhead eval --suite paper``.

:mod:`.scales` says how large, :mod:`.systems` what is compared, :mod:`.plan` which cells that is,
:mod:`.steps` how each is computed, :mod:`.cells` keeps and resumes them, :mod:`.report` shows them.
"""
