# SPDX-License-Identifier: Apache-2.0
"""The wheel: `build` makes it, `environment` installs and tests it with `smoke`."""
