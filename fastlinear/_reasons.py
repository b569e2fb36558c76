"""Why the engine does not answer a call. docs/architecture.md says what is computed then."""

DISABLED = "disabled"  # FASTLINEAR_DISABLE says so
SWITCHED_OFF = "FASTLINEAR_DISABLE"  # in the report; the engine's word for it is DISABLED
UNFIT = "unfit"  # it must go through torch: a mode that watches, another dtype or device
TRAINING = "training"  # training mode, in which torch computes on the parameter itself
GRADIENT = "gradient"  # the kernels may answer, but gradients are wanted of the answer
AUTOCAST = "autocast"  # some autocast is on, and nothing else watches
PROFILED = "profiled"  # it should show up in the profile
STALE = "stale"  # the weight is not packed, or changed since
CHANGING = "its weight keeps changing"  # in the report; the engine's word for it is STALE
UNPLANNED = "unplanned"  # no plan yet for this bucket of M and this number of threads, or one that is due
