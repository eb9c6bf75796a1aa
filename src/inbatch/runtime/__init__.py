"""The process, the machine, files and ranks. Nothing here knows of learning."""
