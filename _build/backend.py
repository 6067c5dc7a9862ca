# SPDX-License-Identifier: Apache-2.0
"""The PEP 517 backend: that of setuptools, which asks for torch only if the environment has none.

The extension needs torch's headers to compile, and runs on any torch from 2.11 on. If torch stood
in ``[build-system] requires``, pip would download its newest CUDA build into the isolated build
environment, although a suitable torch is already installed. If no torch is installed, the build
requires "torch>=2.11", or what DUALHEAD_BUILD_TORCH names instead.
"""

import os

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403 - the hooks that stay as they are
from torch_location import MINIMUM, find_installed_torch


def _torch_requirement():
    if find_installed_torch() is not None:
        return []
    return [os.environ.get("DUALHEAD_BUILD_TORCH") or f"torch>={MINIMUM[0]}.{MINIMUM[1]}"]


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + _torch_requirement()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + _torch_requirement()
