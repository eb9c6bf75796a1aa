"""The process, the machine, files and ranks, independent of machine learning."""
