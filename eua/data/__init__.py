"""Rows → token ids → batches that hold forget and retain rows."""
