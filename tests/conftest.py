import os

# Tests run beside other work: threads that wait without spinning are many times faster on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
