"""Encoder weights from checkpoints of this and other projects."""
