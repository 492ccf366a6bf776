"""Lost ranks, stalled steps, preemption signals."""
