"""Evaluation of frozen and fine-tuned encoders."""
