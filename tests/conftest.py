import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the flat modules: an install, even an editable one, has the package alone

# Tests run beside other work: threads that wait without spinning are many times faster on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
