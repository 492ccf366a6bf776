"""Ranks: rendezvous, agreement, collectives, synchronized BatchNorm."""
