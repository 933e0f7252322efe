"""The GPU watched from the launcher: NVML and psutil, ten times a second; no torch. The only package that uses NVML."""
