"""Fixtures of the tests of the native library: its kernels of each instruction set, operands beside guard pages."""

from __future__ import annotations

from native_kernels import kernels as kernels
from native_kernels import place as place
from native_kernels import plain_kernels as plain_kernels
