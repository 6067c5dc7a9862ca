# SPDX-License-Identifier: Apache-2.0
"""What every measured figure needs: alternating timings, and the machine they came from."""
