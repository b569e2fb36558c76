"""One lock for packing, planning and freezing; a call that is packed and planned never takes it, nor does a race."""

from __future__ import annotations

import os
import threading

lock = threading.RLock()
if hasattr(os, "register_at_fork"):  # another thread may have held it
    os.register_at_fork(after_in_child=lock._at_fork_reinit)  # type: ignore[attr-defined]
