# SPDX-License-Identifier: Apache-2.0
"""The paper's comparisons as one run: ``dualhead eval --suite paper``.

:mod:`.scales` defines the size of a run, :mod:`.systems` the systems, :mod:`.plan` the cells,
:mod:`.steps` how each is computed; :mod:`.cells` stores and resumes them, :mod:`.report` writes the
output.
"""
