"""What `engine.report` writes its page from: comparisons of runs, their curves, and what their encoders see."""
