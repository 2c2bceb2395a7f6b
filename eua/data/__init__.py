"""Rows → token ids → batches of forget and retain rows."""
