"""`make bench`: where the time and the memory of a container in a microVM go, as ratios to baselines of the same run.

A time alone says little on a machine that others use too. So every time stands beside something that was
measured in alternation with it: the machine's own floor, the bare interpreter, the same thing with runc.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# packaging/ holds scripts that import each other by plain names. Last, so that they hide nothing.
sys.path.append(str(ROOT / "packaging"))
