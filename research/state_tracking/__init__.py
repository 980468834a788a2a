"""State tracking: a task with a label at every position, on which depth pays."""
