"""What the user types: commands, options, the pipeline in order, the report and the terminal. No mathematics."""

__version__ = "0.1.0"
