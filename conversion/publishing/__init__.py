"""Folders for the Hub: exported with code and card, verified in a clean process, pushed."""
