"""`python -m causalreel` is the command `causalreel`."""

from __future__ import annotations

import sys

from causalreel.cli import main

sys.exit(main())
