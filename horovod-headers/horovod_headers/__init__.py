"""Lets the compiler find this package's headers before TensorFlow's.

Horovod 0.28.1 includes seven headers of TensorFlow that wheels of TensorFlow 2.19 and later lack, or have without what
they include themselves. It uses them on GPUs only, so here they are empty. `include/older_habits.h` holds what g++ 13
and 14 ask for besides. Horovod's source stays untouched.

uv installs this package into the environment in which it builds Horovod (pyproject.toml, extra-build-dependencies), and
nowhere else. Python imports it there at every start (horovod_headers.pth), before Horovod's build calls CMake.
"""

import os
from pathlib import Path

INCLUDE = Path(__file__).parent / "include"

if str(INCLUDE) not in os.environ.get("CXXFLAGS", ""):
    flags = f'-I"{INCLUDE}" -include "{INCLUDE / "older_habits.h"}"'
    os.environ["CXXFLAGS"] = f"{flags} {os.environ.get('CXXFLAGS', '')}".strip()
