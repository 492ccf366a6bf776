"""What an encoder is worth: the commands of `python -m engine.evaluate`."""
