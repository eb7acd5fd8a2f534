"""Optimizer states as dictionaries: this package's, torch's and other libraries'. The door is :mod:`orlop.state.checkpoint`."""
